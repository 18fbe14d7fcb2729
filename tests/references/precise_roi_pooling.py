"""The mean of the bilinear interpolation over each bin, point by point and piece by piece, in float64."""

import itertools
import math

import numpy as np


def interpolated(features, y, x):
    """The value at (y, x), cell centres at whole numbers, zeros around the map."""
    height, width, channels = features.shape
    value = np.zeros(channels)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * features[row, column]
    return value


def pieces(start, end):
    """Cuts an interval at the whole numbers inside it: length and middle of each piece."""
    cuts = [start, *range(math.floor(start) + 1, math.ceil(end)), end]
    return [(high - low, (high + low) / 2) for low, high in itertools.pairwise(cuts)]


def mean_over_bin(features, top, left, bottom, right):
    """Between four cells the map is linear in x and in y, so a piece's mean is the value in its middle."""
    total = sum(
        height * width * interpolated(features, y, x)
        for height, y in pieces(top, bottom)
        for width, x in pieces(left, right)
    )
    return total / ((bottom - top) * (right - left))


def sampled_mean_over_bin(features, top, left, bottom, right, *, samples=60):
    """The mean of a dense grid of values, nothing known about the map."""
    fractions = (np.arange(samples) + 0.5) / samples
    return np.mean(
        [
            interpolated(features, top + (bottom - top) * down, left + (right - left) * across)
            for down in fractions
            for across in fractions
        ],
        axis=0,
    )


def precise_roi_pool(
    features, boxes, *, output_size, spatial_scale, aligned=True, mean_over_bin=mean_over_bin
):
    features, boxes = np.asarray(features, np.float64), np.asarray(boxes, np.float64)
    result = np.zeros((len(boxes), output_size, output_size, features.shape[2]))
    for number, box in enumerate(boxes):
        left, top, right, bottom = (edge * spatial_scale - (0.5 if aligned else 0.0) for edge in box)
        height, width = (bottom - top) / output_size, (right - left) / output_size
        for row in range(output_size):
            for column in range(output_size):
                y, x = top + row * height, left + column * width
                result[number, row, column] = mean_over_bin(features, y, x, y + height, x + width)
    return result
