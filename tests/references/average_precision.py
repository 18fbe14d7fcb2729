"""COCO average precision of boxes in plain loops, for all areas, from the published description."""

import numpy as np

IOU_THRESHOLDS = [(50 + 5 * i) / 100 for i in range(10)]


def average_precision(ground_truth, results, *, max_detections=100):
    """Returns (AP, recall), both [classes in order of id, 10 thresholds], NaN for a class without objects.

    In each image, the detections of a class match objects in the order of their scores: each takes the free object
    with the highest IoU that reaches the threshold. A detection without an object is not counted if it is inside a
    crowd (by the share of its own area).
    """
    class_ids = sorted(category["id"] for category in ground_truth["categories"])
    image_ids = sorted(image["id"] for image in ground_truth["images"])
    ap = np.full((len(class_ids), 10), np.nan)
    recall = np.full((len(class_ids), 10), np.nan)
    for k, class_id in enumerate(class_ids):
        for t, threshold in enumerate(IOU_THRESHOLDS):
            outcomes, num_objects = [], 0
            for image_id in image_ids:
                truths = [g for g in ground_truth["annotations"] if _is_of(g, image_id, class_id)]
                objects = [g["bbox"] for g in truths if not g.get("iscrowd", 0)]
                crowds = [g["bbox"] for g in truths if g.get("iscrowd", 0)]
                mine = [r for r in results if _is_of(r, image_id, class_id)]
                mine = sorted(mine, key=lambda r: -r["score"])[:max_detections]
                num_objects += len(objects)
                outcomes += _claim(mine, objects, crowds, threshold)
            if num_objects:
                ap[k, t], recall[k, t] = _interpolated(outcomes, num_objects)
    return ap, recall


def _is_of(entry, image_id, class_id):
    return entry["image_id"] == image_id and entry["category_id"] == class_id


def _claim(detections, objects, crowds, threshold):
    """(score, is true positive) of each counted detection."""
    free = dict(enumerate(objects))
    outcomes = []
    for detection in detections:
        best, best_iou = None, threshold
        for index, box in free.items():
            overlap = _intersection(detection["bbox"], box)
            iou = overlap / (_area(detection["bbox"]) + _area(box) - overlap)
            if iou >= best_iou:
                best, best_iou = index, iou
        if best is not None:
            del free[best]
            outcomes.append((detection["score"], True))
            continue
        covered = [_intersection(detection["bbox"], box) / _area(detection["bbox"]) for box in crowds]
        if not any(share >= threshold for share in covered):
            outcomes.append((detection["score"], False))
    return outcomes


def _interpolated(outcomes, num_objects):
    """Mean over 101 recall levels of the best precision reached at that recall or a higher one."""
    points, hits = [], 0
    ranked = sorted(outcomes, key=lambda outcome: -outcome[0])  # stable: ties by image, then by rank
    for seen, (_, is_hit) in enumerate(ranked, start=1):
        hits += is_hit
        points.append((hits / num_objects, hits / seen))
    levels = np.linspace(0, 1, 101)
    best = [max((p for r, p in points if r >= level), default=0.0) for level in levels]
    return sum(best) / 101, hits / num_objects


def _area(box):
    return box[2] * box[3]


def _intersection(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
