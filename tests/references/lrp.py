"""Localization Recall Precision in plain loops, one class and one threshold at a time."""

from tests.references.boxes import iou_of_pair
from tests.references.uncertainty import corners, partition


def lrp(ground_truth, results, category_id, *, iou_threshold, min_score):
    """Returns (LRP, mean misfit, false positive share, false negative share); None for a share of nothing."""
    annotations = [a for a in ground_truth["annotations"] if a["category_id"] == category_id]
    num_objects = sum(not a.get("iscrowd", 0) for a in annotations)
    mine = [r for r in results if r["category_id"] == category_id]
    outcome = partition({"annotations": annotations}, mine, iou_threshold=iou_threshold, min_score=min_score)
    misfits, false_positives = [], 0
    for position, (name, annotation) in outcome.items():
        if name == "true positive":
            iou = iou_of_pair(corners(mine[position]["bbox"]), corners(annotation["bbox"]))
            misfits.append(1 - iou)
        elif name != "ignored":
            false_positives += 1
    hits, missed = len(misfits), num_objects - len(misfits)
    error = sum(misfits) / (1 - iou_threshold) + false_positives + missed
    return (
        error / (hits + false_positives + missed),
        sum(misfits) / hits if hits else None,
        false_positives / (hits + false_positives) if hits + false_positives else None,
        missed / num_objects,
    )


def optimal_lrp(ground_truth, results, category_id, *, iou_threshold):
    """Returns the four numbers at the best threshold, and that threshold; infinity for counting nothing."""
    scores = {r["score"] for r in results if r["category_id"] == category_id} | {float("inf")}
    candidates = [
        (lrp(ground_truth, results, category_id, iou_threshold=iou_threshold, min_score=score), score)
        for score in sorted(scores, reverse=True)
    ]
    return min(candidates, key=lambda candidate: round(candidate[0][0], 12))
