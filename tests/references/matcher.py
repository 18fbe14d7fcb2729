"""Matching of boxes to ground truth, decided box by box."""

import numpy as np

from tests.references.boxes import iou_of_pair, share_inside


def match(boxes, gt_boxes, is_crowd, valid, *, low, high, allow_low_quality_matches):
    """Returns the matched slot, the label (1, 0 or -1 for ignored) and the IoU of each box."""
    objects = [slot for slot in range(len(gt_boxes)) if valid[slot] and not is_crowd[slot]]
    crowds = [slot for slot in range(len(gt_boxes)) if valid[slot] and is_crowd[slot]]
    slots, labels, ious = [], [], []
    for box in boxes:
        best_slot, best_iou = 0, 0.0
        for slot in objects:
            overlap = iou_of_pair(box, gt_boxes[slot])
            if overlap > best_iou:
                best_slot, best_iou = slot, overlap
        label = 1 if best_iou >= high else (0 if best_iou < low else -1)
        slots.append(best_slot)
        labels.append(label)
        ious.append(best_iou)
    if allow_low_quality_matches:
        for slot in objects:
            overlaps = [iou_of_pair(box, gt_boxes[slot]) for box in boxes]
            for row, overlap in enumerate(overlaps):
                # Equal up to rounding: the code under test compares in float32.
                if overlap > 0 and overlap >= max(overlaps) * (1 - 1e-9):
                    labels[row] = 1
    for row, box in enumerate(boxes):
        if labels[row] != 1 and any(share_inside(box, gt_boxes[slot]) >= 0.5 for slot in crowds):
            labels[row] = -1
    return np.array(slots), np.array(labels), np.array(ious)
