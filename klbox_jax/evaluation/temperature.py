"""One factor on the predicted stds of each edge, fitted so that they fit the labels.

Temperature scaling of a Gaussian regression (Levi et al. 2022), edge by edge. It moves no box and leaves the order of
the stds of an edge as it is.
"""

import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.matching import TRUE_POSITIVE, match_detections
from klbox_jax.evaluation.uncertainty import STD_FLOOR, evaluate_uncertainty

METHODS = ("coverage", "likelihood")
# Share of a Gaussian within one std.
ONE_SIGMA = math.erf(math.sqrt(0.5))
# What a calibration is to change, of `evaluate_uncertainty`.
SCORES = ("NLL", "coverage_1sigma", "coverage_2sigma", "coverage_3sigma", "ENCE", "energy_score", "sharpness")


def fit_temperature(
    errors: Float[ndarray, "n 4"], stds: Float[ndarray, "n 4"], *, method: str
) -> Float[ndarray, "4"]:
    """Returns the factor of each edge, in the order `x1, y1, x2, y2`.

    Args:
        errors: prediction minus label.
        stds: positive.
        method: `coverage`, the smallest factor that brings 68.27 % of the labels within one std, whatever the others
            do; or `likelihood`, the factor of the largest Gaussian likelihood, sqrt(mean((error / std)^2)), which
            the largest errors decide.

    Raises:
        ValueError: the method is unknown, there are no rows, or so many errors are 0 that the factor is.
    """
    if method not in METHODS:
        raise ValueError(f"config.calibrate.method = {method!r} is unknown; choose {' or '.join(METHODS)}")
    if not len(errors):
        raise ValueError(
            "no detection found an object of the calibration set; train further, and calibrate then"
        )
    distances = np.abs(errors) / stds
    if method == "coverage":
        factors = np.quantile(distances, ONE_SIGMA, axis=0, method="inverted_cdf")
    else:
        factors = np.sqrt((distances**2).mean(axis=0))
    if not (factors > 0).all():
        raise ValueError(
            f"the {len(errors)} matched detections have hardly an error, which {method} would make the factors "
            f"{factors.tolist()} of; calibrate on images that were not trained on"
        )
    return factors


def matched_errors(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5
) -> tuple[Float[ndarray, "n 4"], Float[ndarray, "n 4"]]:
    """Errors and stds of the true positives, as `evaluate_uncertainty` takes them by default.

    Against `bbox_noisy` where the ground truth has it, and with no std below `STD_FLOOR`. Every result needs a
    `bbox_std`.
    """
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold)
    if matches.stds is None:
        return np.zeros((0, 4)), np.zeros((0, 4))
    rows = np.flatnonzero(matches.kind == TRUE_POSITIVE)
    labels = matches.objects.labels[matches.object_index[rows]]
    return matches.boxes[rows] - labels, np.maximum(matches.stds[rows], STD_FLOOR)


def scale_stds(results: list[dict], temperature: Float[ndarray, "4"]) -> list[dict]:
    """Returns the results with every `bbox_std` multiplied edge by edge; the argument is left as it is."""
    return [
        entry | {"bbox_std": (temperature * np.array(entry["bbox_std"])).tolist()}
        if "bbox_std" in entry
        else entry
        for entry in results
    ]


def calibrate_detections(ground_truth: dict, results: list[dict], *, method: str) -> dict:
    """Fits a temperature to detections.

    Args:
        ground_truth: COCO dictionary of images that are neither trained on nor reported.
        results: as `klbox_jax.evaluation.coco.to_coco_results` makes them, with stds.
        method: which of the two factors to apply; both are returned.

    Returns:
        Plain numbers and strings: `temperature`, four factors in the order `x1, y1, x2, y2`; `method`; `factors`, the
        four of each method; `num_matched`; `before` and `after`, scores of the same detections with the stds as they
        were and scaled.

    Raises:
        ValueError: see `fit_temperature`.
    """
    errors, stds = matched_errors(ground_truth, results)
    temperature = fit_temperature(errors, stds, method=method)
    found = {}
    for name, entries in (("before", results), ("after", scale_stds(results, temperature))):
        scores = evaluate_uncertainty(ground_truth, entries)
        found[name] = {key: scores[key] for key in SCORES} | {"ECE": scores["calibration"]["ECE"]}
    return {
        "temperature": temperature.tolist(),
        "method": method,
        "factors": {name: fit_temperature(errors, stds, method=name).tolist() for name in METHODS},
        "num_matched": len(errors),
        **found,
    }
