"""RoIAlign sample by sample: four neighbours and their bilinear weights, in float64."""

import math

import numpy as np


def bilinear(features, y, x):
    """The value at (y, x), cell centres at whole numbers; zero more than one cell outside the map."""
    height, width, channels = features.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(channels)
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = math.floor(y), math.floor(x)
    if top >= height - 1:
        top = bottom = height - 1
        y = float(top)
    else:
        bottom = top + 1
    if left >= width - 1:
        left = right = width - 1
        x = float(left)
    else:
        right = left + 1
    down, across = y - top, x - left
    return (
        (1 - down) * (1 - across) * features[top, left]
        + (1 - down) * across * features[top, right]
        + down * (1 - across) * features[bottom, left]
        + down * across * features[bottom, right]
    )


def roi_align(features, boxes, *, output_size, sampling_ratio, spatial_scale, aligned=True):
    features, boxes = np.asarray(features, np.float64), np.asarray(boxes, np.float64)
    result = np.zeros((len(boxes), output_size, output_size, features.shape[2]))
    for number, box in enumerate(boxes):
        left, top, right, bottom = (edge * spatial_scale - (0.5 if aligned else 0.0) for edge in box)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        for row in range(output_size):
            for column in range(output_size):
                for i in range(sampling_ratio):
                    for j in range(sampling_ratio):
                        y = top + height / output_size * (row + (i + 0.5) / sampling_ratio)
                        x = left + width / output_size * (column + (j + 0.5) / sampling_ratio)
                        result[number, row, column] += bilinear(features, y, x) / sampling_ratio**2
    return result
