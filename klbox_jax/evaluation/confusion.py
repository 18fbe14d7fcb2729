"""Confusion matrix of detections and objects, matched without regard to their classes."""

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from klbox_jax.evaluation.coco_data import category_names
from klbox_jax.evaluation.matching import IGNORED, TRUE_POSITIVE, match_detections


def confusion_matrix(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5, min_score: float = 0.5
) -> Int[ndarray, "k k"]:
    """Counts pairs of a true and a predicted class, with background as the last class.

    In order of descending score, a detection takes the free object of any class with the largest IoU.

    Args:
        ground_truth: COCO dictionary; detections in crowds of their class are not counted.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`.
        iou_threshold: least IoU of a pair, above 0.1.
        min_score: detections with a lower score are left out.

    Returns:
        Rows are the true and columns the predicted classes, in the order of `category_names`. The last column counts
        missed objects, the last row detections without an object (duplicates included).

    Raises:
        ValueError: see `klbox_jax.evaluation.matching.match_detections`.
    """
    index_of_id = {category_id: i for i, category_id in enumerate(category_names(ground_truth))}
    results = [entry for entry in results if entry["score"] >= min_score]
    # Detections in crowds are found with their own class, pairs with one class for all.
    own = match_detections(ground_truth, results, iou_threshold=iou_threshold)
    is_ignored = np.zeros(len(results), bool)
    is_ignored[own.result_index] = own.kind == IGNORED
    one_class = next(iter(index_of_id), None)
    singles = [entry for entry in ground_truth["annotations"] if not entry.get("iscrowd", 0)]
    same_class = ground_truth | {"annotations": [entry | {"category_id": one_class} for entry in singles]}
    matches = match_detections(
        same_class, [entry | {"category_id": one_class} for entry in results], iou_threshold=iou_threshold
    )
    background = len(index_of_id)
    true = np.array([index_of_id[entry["category_id"]] for entry in singles], int)
    predicted = np.array([index_of_id[results[i]["category_id"]] for i in matches.result_index], int)
    counts = np.zeros((background + 1, background + 1), int)
    is_pair = matches.kind == TRUE_POSITIVE
    np.add.at(counts, (true[matches.object_index[is_pair]], predicted[is_pair]), 1)
    is_alone = ~is_pair & ~is_ignored[matches.result_index]
    np.add.at(counts, (np.full(is_alone.sum(), background), predicted[is_alone]), 1)
    is_missed = np.ones(len(singles), bool)
    is_missed[matches.object_index[is_pair]] = False
    np.add.at(counts, (true[is_missed], np.full(is_missed.sum(), background)), 1)
    return counts
