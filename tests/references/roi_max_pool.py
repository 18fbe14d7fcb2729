"""RoI max pooling bin by bin, with exact fractions for the limits of the bins."""

import math
from fractions import Fraction

import numpy as np


def round_half_away(value):
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def cells_of_bins(first, last, length, output_size):
    """For each bin the cells of the map inside it."""
    first, last = round_half_away(first), round_half_away(last)
    side = Fraction(max(last - first + 1, 1), output_size)
    return [
        [
            cell
            for cell in range(length)
            if first + math.floor(number * side) <= cell < first + math.ceil((number + 1) * side)
        ]
        for number in range(output_size)
    ]


def roi_max_pool(features, boxes, *, output_size, spatial_scale):
    """The pooled values, and of each the flat index of the cell it comes from, -1 for an empty bin."""
    height, width, channels = features.shape
    pooled = np.zeros((len(boxes), output_size, output_size, channels))
    source = np.full(pooled.shape, -1)
    for number, box in enumerate(boxes):
        left, top, right, bottom = (float(edge) * spatial_scale for edge in box)
        columns_of = cells_of_bins(left, right, width, output_size)
        for row, rows in enumerate(cells_of_bins(top, bottom, height, output_size)):
            for column, columns in enumerate(columns_of):
                cells = [i * width + j for i in rows for j in columns]
                if cells:
                    values = features.reshape(-1, channels)[cells]
                    pooled[number, row, column] = values.max(axis=0)
                    source[number, row, column] = np.array(cells)[values.argmax(axis=0)]
    return pooled, source
