"""Localization Recall Precision: an error that counts how well boxes fit (Oksuz et al., ECCV 2018).

At a score threshold, LRP = (sum over true positives of (1 - IoU) / (1 - tau) + FP + FN) / (TP + FP + FN), with tau
the IoU of a true positive. Optimal LRP is its smallest value over thresholds, class by class: unlike average
precision it says which threshold to use. Lower is better, 0 is perfect, 100 is nothing found.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from klbox_jax.evaluation.coco import category_names
from klbox_jax.evaluation.matching import IGNORED, TRUE_POSITIVE, match_detections

_MEANS = ("oLRP", "oLRP_localization", "oLRP_false_positive", "oLRP_false_negative")


def evaluate_lrp(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5, min_score: float = 0.0
) -> dict:
    """LRP and optimal LRP with its components, in per cent.

    Agrees with the authors' code but for the thresholds: theirs are 0, 0.01, ..., 1, ours every score. Every detection
    of the list counts. A class without objects is left out of the means.

    Args:
        ground_truth: COCO dictionary; crowds are no objects, and detections in them are not counted.
        results: as `klbox_jax.evaluation.coco.to_coco_results` makes them.
        iou_threshold: tau.
        min_score: the threshold at which `LRP` is taken.

    Returns:
        Means over classes: `LRP`, of detections with `min_score` or more; `oLRP`; at the optimum `oLRP_localization`
        (mean 1 - IoU of true positives), `oLRP_false_positive` (1 - precision), `oLRP_false_negative` (1 -
        recall). `by_class`: the same for each class by its name (`name (id)` where two share one), and its
        `score_threshold`, the lowest score that counts at the optimum. None stands for a mean of nothing;
        where it is best to count no detection, oLRP is 100 and the threshold is None.

    Raises:
        ValueError: see `klbox_jax.evaluation.matching.match_detections`, or tau is 1.
    """
    if iou_threshold == 1:
        raise ValueError("iou_threshold must be below 1: LRP divides by what is left above it")
    matches = match_detections(
        ground_truth, results, iou_threshold=iou_threshold, background_iou=0.0, min_score=-np.inf
    )
    by_class = {}
    for category_id, name in sorted(category_names(ground_truth).items()):
        counted = (matches.category_ids == category_id) & (matches.kind != IGNORED)
        num_objects = int((matches.objects.category_ids == category_id).sum())
        is_hit = matches.kind[counted] == TRUE_POSITIVE
        scores = matches.scores[counted]
        misfit = np.where(is_hit, 1 - matches.iou[counted], 0.0)
        if num_objects:
            errors = _lrp_of_first(misfit, is_hit, num_objects, iou_threshold)
            num_above = int((scores >= min_score).sum())
            by_class[name] = {"LRP": 100 * float(errors[num_above])}
            by_class[name] |= _optimum(scores, misfit, is_hit, errors, num_objects)
        else:
            by_class[name] = dict.fromkeys(("LRP", *_MEANS, "score_threshold"))
    means = {key: _mean([entry[key] for entry in by_class.values()]) for key in ("LRP", *_MEANS)}
    return means | {"by_class": by_class}


def _lrp_of_first(
    misfit: Float[ndarray, " D"], is_hit: Bool[ndarray, " D"], num_objects: int, tau: float
) -> Float[ndarray, " D+1"]:
    """LRP of the first 0, 1, ..., D detections."""
    counts = np.arange(len(misfit) + 1)
    hits = np.append(0, np.cumsum(is_hit))
    misfits = np.append(0.0, np.cumsum(misfit))
    # TP + FP + FN is every detection and every object, true positives once.
    missed = num_objects - hits
    return (misfits / (1 - tau) + (counts - hits) + missed) / (counts + missed)


def _optimum(
    scores: Float[ndarray, " D"],
    misfit: Float[ndarray, " D"],
    is_hit: Bool[ndarray, " D"],
    errors: Float[ndarray, " D+1"],
    num_objects: int,
) -> dict:
    """oLRP, its components and threshold, in the order of `_MEANS`; a threshold lets a whole tie in."""
    possible = np.append(True, np.append(scores[1:] < scores[:-1], True)) if len(scores) else np.array([True])
    count = int(np.flatnonzero(possible)[np.argmin(errors[possible])])
    hits = int(is_hit[:count].sum())
    parts = (
        float(errors[count]),
        float(misfit[:count].sum()) / hits if hits else None,
        1 - hits / count if count else None,
        1 - hits / num_objects,
    )
    found = {name: None if part is None else 100 * part for name, part in zip(_MEANS, parts, strict=True)}
    return found | {"score_threshold": float(scores[count - 1]) if count else None}


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
