"""Greedy NMS: take the best box, remove the boxes that overlap it, repeat."""

import numpy as np

from tests.references.boxes import iou_of_pair


def greedy_nms(boxes, scores, valid, *, iou_threshold, classes=None, iou=iou_of_pair):
    """Surviving rows, best first; `iou` is an optional function of two boxes."""
    remaining = [row for row in range(len(boxes)) if valid[row]]
    kept = []
    while remaining:
        best = remaining[0]
        for row in remaining:
            if scores[row] > scores[best]:
                best = row
        kept.append(best)
        remaining = [
            row
            for row in remaining
            if row != best
            and not (
                (classes is None or classes[row] == classes[best])
                and iou(boxes[best], boxes[row]) > iou_threshold
            )
        ]
    return np.array(kept, dtype=np.int64)
