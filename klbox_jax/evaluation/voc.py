"""Average precision by the PASCAL VOC protocol, from the same ground truth and results as the COCO protocol.

Agrees with the devkit's `VOCevaldet`. The detections of a class are processed by descending score over all images.
Each is compared with the object of its image that it overlaps most. It is a true positive if that IoU is at least the
threshold and no better detection has taken the object. A detection whose object is difficult is not counted.

The devkit adds 1 to every width, because its boxes include their last pixel. Boxes here have continuous edges: the VOC
box `xmin, ymin, xmax, ymax` is `xmin - 1, ymin - 1, xmax, ymax`, whose width equals the devkit's without the addition.
So the IoUs equal the devkit's for results written as `x1 + 1, y1 + 1, x2, y2`.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from klbox_jax.evaluation.coco_data import category_names, check_results


def evaluate_voc(ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5) -> dict:
    """Computes average precision of boxes by the VOC protocol, in per cent.

    Means are over the classes with at least one object that is not difficult; the other classes are None.

    Args:
        ground_truth: COCO dictionary. An annotation is ignored if its `difficult` is 1, or, without that field, if its
            `iscrowd` is 1.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`; all of them count, ties in the order
            of the list.
        iou_threshold: least IoU of a true positive.

    Returns:
        `AP_11_points` (VOC 2007: mean of the best precision at or above recall 0, 0.1, ..., 1) and `AP_area` (VOC 2010
        and later: area under the curve of the best precision at or above each recall), and the same by category name
        in `AP_11_points_by_class` and `AP_area_by_class`.

    Raises:
        ValueError: a result names an unknown image or category, or is not finite.
    """
    check_results(ground_truth, results)
    by_rule = {"AP_11_points": {}, "AP_area": {}}
    for category_id, name in category_names(ground_truth).items():
        objects = [entry for entry in ground_truth["annotations"] if entry["category_id"] == category_id]
        found = [entry for entry in results if entry["category_id"] == category_id]
        num_objects = sum(not _is_ignored(entry) for entry in objects)
        outcomes = _outcomes(objects, found, iou_threshold)
        recall, precision = _curve(outcomes, num_objects)
        for rule, average in (("AP_11_points", _eleven_points), ("AP_area", _area_under)):
            ap = 100.0 * average(recall, precision) if num_objects else None
            by_rule[rule][name] = ap
    metrics = {}
    for rule, by_class in by_rule.items():
        present = [ap for ap in by_class.values() if ap is not None]
        metrics[rule] = sum(present) / len(present) if present else None
    return metrics | {f"{rule}_by_class": by_class for rule, by_class in by_rule.items()}


def _is_ignored(annotation: dict) -> bool:
    return bool(annotation.get("difficult", annotation.get("iscrowd", 0)))


def _corners(annotations: list[dict]) -> Float[ndarray, "n 4"]:
    boxes = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _outcomes(objects: list[dict], found: list[dict], iou_threshold: float) -> Bool[ndarray, " n"]:
    """Returns True for each true and False for each false positive of a class, best scores first."""
    rows_of: dict[Any, list[int]] = {}
    for row, entry in enumerate(objects):
        rows_of.setdefault(entry["image_id"], []).append(row)
    boxes = _corners(objects)
    is_free = np.ones(len(objects), bool)
    outcomes = []
    order = np.argsort([-entry["score"] for entry in found], kind="stable")
    for index, box in zip(order, _corners(found)[order], strict=True):
        rows = rows_of.get(found[index]["image_id"], [])
        ious = _iou(box, boxes[rows])
        best = int(ious.argmax()) if rows else 0
        if not rows or ious[best] < iou_threshold:
            outcomes.append(False)
        elif not _is_ignored(objects[rows[best]]):
            outcomes.append(bool(is_free[rows[best]]))
            is_free[rows[best]] = False
    return np.array(outcomes, bool)


def _iou(box: Float[ndarray, "4"], others: Float[ndarray, "n 4"]) -> Float[ndarray, " n"]:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    intersection = np.maximum(sides, 0.0).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - intersection
    return np.where(intersection > 0, intersection / np.where(union > 0, union, 1.0), 0.0)


def _curve(
    outcomes: Bool[ndarray, " n"], num_objects: int
) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """Returns recall after each detection, and the best precision at that recall or above."""
    hits = np.cumsum(outcomes)
    precision = hits / np.arange(1, len(hits) + 1)
    return hits / max(num_objects, 1), np.maximum.accumulate(precision[::-1])[::-1]


def _eleven_points(recall: Float[ndarray, " n"], precision: Float[ndarray, " n"]) -> float:
    # Integers divided by 10: a level of 0.30000000000000004 would miss a recall of 3 / 10.
    first = np.searchsorted(recall, np.arange(11) / 10)
    return float(np.append(precision, 0.0)[first].mean())


def _area_under(recall: Float[ndarray, " n"], precision: Float[ndarray, " n"]) -> float:
    return float((np.diff(recall, prepend=0.0) * precision).sum())
