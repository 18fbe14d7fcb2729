"""Precision-recall curves by class, as in COCO's average precision."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.coco_data import category_names
from klbox_jax.evaluation.matching import IGNORED, TRUE_POSITIVE, match_detections

RECALL_LEVELS = np.linspace(0.0, 1.0, 101)


def precision_by_class(
    ground_truth: dict, results: list[dict], *, iou_threshold: float
) -> dict[str, Float[ndarray, "101"] | None]:
    """Computes the interpolated precision at each of `RECALL_LEVELS`, 0 to 1.

    The precision at a recall is the highest precision at that recall or above, and 0 at recalls that are not reached.
    The mean of a curve is the class's average precision at this IoU threshold (all results count, not only the first
    100 of each image).

    Args:
        ground_truth: COCO dictionary.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`.
        iou_threshold: least IoU of a true positive.

    Returns:
        The curve of each class by its name (`name (id)` if two share a name); None for a class without objects.

    Raises:
        ValueError: see `klbox_jax.evaluation.matching.match_detections`.
    """
    matches = match_detections(
        ground_truth, results, iou_threshold=iou_threshold, background_iou=0.0, min_score=-np.inf
    )
    curves = {}
    for category_id, name in category_names(ground_truth).items():
        counted = (matches.category_ids == category_id) & (matches.kind != IGNORED)
        is_hit = matches.kind[counted] == TRUE_POSITIVE
        num_objects = int((matches.objects.category_ids == category_id).sum())
        curves[name] = _interpolated(is_hit, num_objects) if num_objects else None
    return curves


def _interpolated(is_hit: ndarray, num_objects: int) -> Float[ndarray, "101"]:
    hits = np.cumsum(is_hit)
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return envelope[np.searchsorted(hits / num_objects, RECALL_LEVELS)]
