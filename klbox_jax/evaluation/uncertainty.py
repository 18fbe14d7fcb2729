"""Scores of predicted box stds, computed from saved detections.

The predicted Gaussian of an edge is compared with its label: `bbox_noisy` if the ground truth has it, because the std
should include the annotator's noise, and `bbox` otherwise. Scores are pooled over the edges of all classes (probdet
averages over classes), in pixels of the file. Likelihoods and entropies are means per edge (probdet adds the four edges
of a box).
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from klbox_jax.evaluation.calibration_error import (
    calibration_errors,
    coverage,
    expected_normalized_calibration_error,
)
from klbox_jax.evaluation.matching import (
    DUPLICATE,
    FALSE_POSITIVE,
    IGNORED,
    LOCALIZATION_ERROR,
    TRUE_POSITIVE,
    Matches,
    match_detections,
)
from klbox_jax.evaluation.ranking import (
    area_under_sparsification_error,
    spearman,
    worst_edge_share,
)
from klbox_jax.evaluation.scoring_rules import energy_score, expected_norm, gaussian_entropy, gaussian_nll

EDGES = ("x1", "y1", "x2", "y2")
# Pixels. Smaller stds are replaced by this, because the NLL of a std of 0 is infinite. probdet adds its square (1e-2)
# to every variance instead.
STD_FLOOR = 0.1


def evaluate_uncertainty(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5, min_score: float = 0.0
) -> dict:
    """Scores the predicted stds of all detections, by the partition of `klbox_jax.evaluation.matching`.

    Every std below `STD_FLOOR` (0.1 pixels) is replaced by it before all scores, `sharpness` included.

    Args:
        ground_truth: COCO dictionary. Annotations may have `bbox_noisy` (`[x, y, width, height]`, the label as drawn,
            if `bbox` is exact) and `bbox_std` (true stds of the label noise of `x1, y1, x2, y2`).
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`. Without `bbox_std` only counts and
            RMSE are numbers, and the rest is None.
        iou_threshold: least IoU of a true positive.
        min_score: detections with a lower score are left out; see `max_f1_score_threshold`.

    Returns:
        Plain numbers, strings and None. Of the true positives:
        `num_matched`; `RMSE` (relative to `bbox`, the exact box if there is one) and `RMSE_label` (relative to the
        label); `NLL`; `coverage_1sigma`, `coverage_2sigma`, `coverage_3sigma`; `spearman_sigma_error`;
        `sharpness` (mean std); `entropy`; `energy_score`; `ENCE`; `AUSE`; `calibration`, see
        `klbox_jax.evaluation.calibration_error.calibration_errors`; `by_edge`, the scores that are defined for a single
        edge. `duplicates` and `localization_errors` have the same, relative to the object they overlap most.
        `false_positives` have no label: `num`, `sharpness`, `entropy` and `spread`, the expected distance of
        two draws. `true_std` compares true positives with the true stds (see `against_true_stds`); None if the ground
        truth has none. Also `num_objects`, `num_missed`, `num_ignored`, `iou_threshold`, `min_score`.

    Raises:
        ValueError: see `match_detections`.
    """
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold, min_score=min_score)
    rows = {
        kind: np.flatnonzero(matches.kind == kind)
        for kind in (TRUE_POSITIVE, DUPLICATE, LOCALIZATION_ERROR, FALSE_POSITIVE, IGNORED)
    }
    num_objects, num_matched = len(matches.objects.boxes), len(rows[TRUE_POSITIVE])
    return {
        "num_objects": num_objects,
        "num_missed": num_objects - num_matched,
        "num_ignored": len(rows[IGNORED]),
        "iou_threshold": iou_threshold,
        "min_score": min_score,
        **_scores_with_object(matches, rows[TRUE_POSITIVE]),
        "duplicates": _scores_with_object(matches, rows[DUPLICATE]),
        "localization_errors": _scores_with_object(matches, rows[LOCALIZATION_ERROR]),
        "false_positives": _scores_without_object(matches, rows[FALSE_POSITIVE]),
        "true_std": _against_true_stds_of(matches, rows[TRUE_POSITIVE]),
    }


def against_true_stds(
    stds: Float[ndarray, "n 4"], true_stds: Float[ndarray, "n 4"], boxes: Float[ndarray, "n 4"]
) -> dict:
    """Compares predicted stds with the true stds of the label noise.

    The noise grows with the object, so a correlation with size alone is reported next to each correlation.

    Args:
        stds: predicted, in pixels.
        true_stds: in pixels.
        boxes: `x1, y1, x2, y2` of the objects. The side of an edge is the extent of the box across it.

    Returns:
        `spearman` of predicted and true std in pixels, `spearman_of_size` of the side and the true std;
        `spearman_relative` of predicted and true std as shares of the side, `spearman_relative_of_size` of the inverse
        side (the share if all edges had one std) and the true share; `worst_edge` and `num_worst_edge`, see
        `klbox_jax.evaluation.ranking.worst_edge_share`; `median_ratio` of predicted to true std.
    """
    sides = np.tile(np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0), 2)
    share, count = worst_edge_share(stds, true_stds)
    ratios = stds[true_stds > 0] / true_stds[true_stds > 0]
    return {
        "spearman": spearman(stds.ravel(), true_stds.ravel()),
        "spearman_of_size": spearman(sides.ravel(), true_stds.ravel()),
        "spearman_relative": spearman((stds / sides).ravel(), (true_stds / sides).ravel()),
        "spearman_relative_of_size": spearman((1 / sides).ravel(), (true_stds / sides).ravel()),
        "worst_edge": share,
        "num_worst_edge": count,
        "median_ratio": float(np.median(ratios)) if ratios.size else None,
    }


def _scores_with_object(matches: Matches, rows: Int[ndarray, " n"]) -> dict:
    """Returns the scores of detections that have an object."""
    objects = matches.object_index[rows]
    off_box = matches.boxes[rows] - matches.objects.boxes[objects]
    off_label = matches.boxes[rows] - matches.objects.labels[objects]
    stds = _stds(matches, rows)
    scores = {
        "num_matched": len(rows),
        "RMSE": _root_mean_square(off_box),
        "RMSE_label": _root_mean_square(off_label),
        **_edge_scores(off_label, stds),
        "energy_score": None if stds is None else _mean(energy_score(off_label, stds)),
        "calibration": None if stds is None else calibration_errors(off_label, stds),
    }
    scores["by_edge"] = {
        name: {
            "RMSE": _root_mean_square(off_box[:, edge]),
            "RMSE_label": _root_mean_square(off_label[:, edge]),
            **_edge_scores(off_label[:, edge], None if stds is None else stds[:, edge]),
        }
        for edge, name in enumerate(EDGES)
    }
    return scores


def _edge_scores(errors: Float[ndarray, "*n"], stds: Float[ndarray, "*n"] | None) -> dict:
    """Returns the scores that are defined for single edges, over all edges given."""
    names = (
        "NLL",
        "entropy",
        "coverage_1sigma",
        "coverage_2sigma",
        "coverage_3sigma",
        "spearman_sigma_error",
    )
    if stds is None:
        return dict.fromkeys((*names, "sharpness", "ENCE", "AUSE"))
    errors, stds = errors.ravel(), stds.ravel()
    return {
        "NLL": _mean(gaussian_nll(errors, stds)),
        "entropy": _mean(gaussian_entropy(stds)),
        "coverage_1sigma": coverage(errors, stds, sigmas=1.0),
        "coverage_2sigma": coverage(errors, stds, sigmas=2.0),
        "coverage_3sigma": coverage(errors, stds, sigmas=3.0),
        "spearman_sigma_error": spearman(stds, np.abs(errors)),
        "sharpness": _mean(stds),
        "ENCE": expected_normalized_calibration_error(errors, stds),
        "AUSE": area_under_sparsification_error(errors, stds),
    }


def _scores_without_object(matches: Matches, rows: Int[ndarray, " n"]) -> dict:
    """Returns the scores of detections without an object."""
    stds = _stds(matches, rows)
    if stds is None:
        return {"num": len(rows), **dict.fromkeys(("sharpness", "entropy", "spread"))}
    return {
        "num": len(rows),
        "sharpness": _mean(stds),
        "entropy": _mean(gaussian_entropy(stds)),
        "spread": _mean(expected_norm(np.zeros_like(stds), np.sqrt(2.0) * stds)),
    }


def _against_true_stds_of(matches: Matches, rows: Int[ndarray, " n"]) -> dict | None:
    stds = _stds(matches, rows)
    objects = matches.object_index[rows]
    true_stds = matches.objects.label_stds[objects]
    known = np.isfinite(true_stds).all(axis=1)
    if stds is None or not known.any():
        return None
    return against_true_stds(stds[known], true_stds[known], matches.objects.boxes[objects][known])


def _stds(matches: Matches, rows: Int[ndarray, " n"]) -> Float[ndarray, "n 4"] | None:
    return None if matches.stds is None else np.maximum(matches.stds[rows], STD_FLOOR)


def _mean(values: Float[ndarray, "*n"]) -> float | None:
    return float(values.mean()) if values.size else None


def _root_mean_square(values: Float[ndarray, "*n"]) -> float | None:
    return float(np.sqrt((values**2).mean())) if values.size else None
