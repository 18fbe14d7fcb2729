"""Localization Recall Precision (LRP): an error that includes localization quality (Oksuz et al., ECCV 2018).

At a score threshold, LRP = (sum over true positives of (1 - IoU) / (1 - tau) + FP + FN) / (TP + FP + FN), where tau
is the least IoU of a true positive. Optimal LRP is its smallest value over thresholds, computed for each class: unlike
average precision it gives the score threshold to use. Lower is better; 0 is perfect, 100 is nothing found.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from klbox_jax.evaluation.coco_data import category_names
from klbox_jax.evaluation.matching import IGNORED, TRUE_POSITIVE, match_detections

_MEANS = ("oLRP", "oLRP_localization", "oLRP_false_positive", "oLRP_false_negative")


@dataclasses.dataclass(frozen=True)
class _ClassDetections:
    """Counted detections of one class, best scores first.

    Attributes:
        scores: of the detections.
        is_hit: True for true positives.
        localization_errors: 1 - IoU of true positives, 0 otherwise.
        num_objects: number of objects of the class.
    """

    scores: Float[ndarray, " D"]
    is_hit: Bool[ndarray, " D"]
    localization_errors: Float[ndarray, " D"]
    num_objects: int


def evaluate_lrp(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5, min_score: float = 0.0
) -> dict:
    """Computes LRP, optimal LRP and its components, in per cent.

    Agrees with the authors' code except for the score thresholds: theirs are 0, 0.01, ..., 1, here every score is one.
    Every detection of the list counts. A class without objects is left out of the means.

    Args:
        ground_truth: COCO dictionary; crowds are not objects, and detections inside them are not counted.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`.
        iou_threshold: tau, from above 0 to below 1.
        min_score: score threshold of `LRP`.

    Returns:
        Means over classes: `LRP`, of detections with at least `min_score`; `oLRP`; its components at the optimum:
        `oLRP_localization` (mean 1 - IoU of true positives), `oLRP_false_positive` (1 - precision) and
        `oLRP_false_negative` (1 - recall). `by_class`: the same for each class name (`name (id)` if two share a name),
        with `score_threshold`, the lowest score that counts at the optimum. A mean over nothing is None. If it is best
        to count no detection, oLRP is 100 and the threshold is None.

    Raises:
        ValueError: tau is 1, or see `klbox_jax.evaluation.matching.match_detections`.
    """
    if iou_threshold == 1:
        raise ValueError("iou_threshold must be below 1, because LRP divides by 1 - iou_threshold")
    matches = match_detections(
        ground_truth, results, iou_threshold=iou_threshold, background_iou=0.0, min_score=-np.inf
    )
    by_class = {}
    for category_id, name in category_names(ground_truth).items():
        counted = (matches.category_ids == category_id) & (matches.kind != IGNORED)
        is_hit = matches.kind[counted] == TRUE_POSITIVE
        found = _ClassDetections(
            scores=matches.scores[counted],
            is_hit=is_hit,
            localization_errors=np.where(is_hit, 1 - matches.iou[counted], 0.0),
            num_objects=int((matches.objects.category_ids == category_id).sum()),
        )
        if found.num_objects:
            errors = _lrp_by_count(found, iou_threshold)
            num_above = int((found.scores >= min_score).sum())
            by_class[name] = {"LRP": 100 * float(errors[num_above])} | _optimum(found, errors)
        else:
            by_class[name] = dict.fromkeys(("LRP", *_MEANS, "score_threshold"))
    means = {key: _mean([entry[key] for entry in by_class.values()]) for key in ("LRP", *_MEANS)}
    return means | {"by_class": by_class}


def _lrp_by_count(found: _ClassDetections, tau: float) -> Float[ndarray, " _"]:
    """Returns the LRP of the best 0, 1, ..., D detections, D + 1 numbers."""
    counts = np.arange(len(found.scores) + 1)
    hits = np.append(0, np.cumsum(found.is_hit))
    errors = np.append(0.0, np.cumsum(found.localization_errors))
    # TP + FP + FN counts every detection and every object, but true positives only once.
    missed = found.num_objects - hits
    return (errors / (1 - tau) + (counts - hits) + missed) / (counts + missed)


def _optimum(found: _ClassDetections, errors: Float[ndarray, " _"]) -> dict:
    """Returns oLRP, its components and its score threshold; a threshold keeps all detections of equal score."""
    scores = found.scores
    possible = np.append(True, np.append(scores[1:] < scores[:-1], True)) if len(scores) else np.array([True])
    count = int(np.flatnonzero(possible)[np.argmin(errors[possible])])
    hits = int(found.is_hit[:count].sum())
    parts = (  # in the order of _MEANS
        float(errors[count]),
        float(found.localization_errors[:count].sum()) / hits if hits else None,
        1 - hits / count if count else None,
        1 - hits / found.num_objects,
    )
    scaled = {name: None if part is None else 100 * part for name, part in zip(_MEANS, parts, strict=True)}
    return scaled | {"score_threshold": float(scores[count - 1]) if count else None}


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
