"""Box arithmetic in plain float64 loops."""

import numpy as np


def iou_of_pair(a, b):
    a, b = [float(edge) for edge in a], [float(edge) for edge in b]
    shared_x = min(a[2], b[2]) - max(a[0], b[0])
    shared_y = min(a[3], b[3]) - max(a[1], b[1])
    shared = shared_x * shared_y if shared_x > 0 and shared_y > 0 else 0.0
    total = 0.0
    for x1, y1, x2, y2 in (a, b):
        if x2 > x1 and y2 > y1:
            total += (x2 - x1) * (y2 - y1)
    return 0.0 if total == shared else shared / (total - shared)


def iou_matrix(a, b):
    return np.array([[iou_of_pair(row, column) for column in b] for row in a]).reshape(len(a), len(b))


def share_inside(box, region):
    """Share of the area of `box` inside `region`."""
    shared_x = min(box[2], region[2]) - max(box[0], region[0])
    shared_y = min(box[3], region[3]) - max(box[1], region[1])
    if shared_x <= 0 or shared_y <= 0:
        return 0.0
    return float(shared_x * shared_y) / float((box[2] - box[0]) * (box[3] - box[1]))


def clustered_boxes(rng, count, *, canvas=200.0):
    """Random boxes around a few centres, in half pixels: ties occur, and float32 areas are exact."""
    centres = rng.uniform(0, canvas, (max(count // 10, 1), 2))
    middle = centres[rng.integers(0, len(centres), count)] + rng.normal(0, 6, (count, 2))
    size = rng.uniform(15, 50, (count, 2))
    return (np.concatenate([middle - size / 2, middle + size / 2], axis=1) * 2).round().astype(np.float32) / 2
