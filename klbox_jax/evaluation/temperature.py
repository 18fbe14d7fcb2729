"""Temperature scaling of predicted stds: one fitted factor for each of the four edges (Levi et al. 2022).

It moves no box, and keeps the order of the stds of an edge.
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
# Scores of `evaluate_uncertainty` to report before and after a calibration.
SCORES = ("NLL", "coverage_1sigma", "coverage_2sigma", "coverage_3sigma", "ENCE", "energy_score", "sharpness")


def fit_temperature(
    errors: Float[ndarray, "n 4"], stds: Float[ndarray, "n 4"], *, method: str
) -> Float[ndarray, "4"]:
    """Fits the factor of each edge, in the order `x1, y1, x2, y2`.

    Args:
        errors: prediction minus label, in pixels.
        stds: positive, in pixels.
        method: `coverage`, the smallest factor that puts 68.27 % of the labels within one std, independent of the size
            of the other errors; or `likelihood`, the factor of the largest Gaussian likelihood,
            sqrt(mean((error / std)^2)), which is dominated by the largest errors.

    Raises:
        ValueError: the method is unknown, there are no rows, or a fitted factor is 0 because most errors are 0.
    """
    if method not in METHODS:
        raise ValueError(f"config.calibrate.method = {method!r} is unknown; choose {' or '.join(METHODS)}")
    if not len(errors):
        raise ValueError(
            "no detection matches an object of the calibration set; train longer, then calibrate"
        )
    distances = np.abs(errors) / stds
    if method == "coverage":
        factors = np.quantile(distances, ONE_SIGMA, axis=0, method="inverted_cdf")
    else:
        factors = np.sqrt((distances**2).mean(axis=0))
    if not (factors > 0).all():
        raise ValueError(
            f"{method} gives the factors {factors.tolist()}, because most errors of the {len(errors)} matched "
            "detections are 0; calibrate on images that were not used for training"
        )
    return factors


def matched_errors(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5
) -> tuple[Float[ndarray, "n 4"], Float[ndarray, "n 4"]]:
    """Returns errors and stds of the true positives, with the defaults of `evaluate_uncertainty`.

    Errors are relative to `bbox_noisy` if the ground truth has it, to `bbox` otherwise; stds are at least `STD_FLOOR`.
    Results without `bbox_std` give no rows.
    """
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold)
    if matches.stds is None:
        return np.zeros((0, 4)), np.zeros((0, 4))
    rows = np.flatnonzero(matches.kind == TRUE_POSITIVE)
    labels = matches.objects.labels[matches.object_index[rows]]
    return matches.boxes[rows] - labels, np.maximum(matches.stds[rows], STD_FLOOR)


def scale_stds(results: list[dict], temperature: Float[ndarray, "4"]) -> list[dict]:
    """Returns copies of the results with every `bbox_std` multiplied edge by edge."""
    return [
        entry | {"bbox_std": (temperature * np.array(entry["bbox_std"])).tolist()}
        if "bbox_std" in entry
        else entry
        for entry in results
    ]


def calibrate_detections(ground_truth: dict, results: list[dict], *, method: str) -> dict:
    """Fits a temperature to saved detections, and scores them before and after.

    Args:
        ground_truth: COCO dictionary of images that are used neither for training nor for reported numbers.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`, with stds.
        method: factor to apply, `coverage` or `likelihood`; both are returned.

    Returns:
        Plain numbers and strings: `temperature`, the four applied factors in the order `x1, y1, x2, y2`; `method`;
        `factors`, the four of each method; `num_matched`; `before` and `after`, scores of the same detections with the
        original and with the scaled stds.

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
