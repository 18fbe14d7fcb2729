"""Masks inside boxes, read point by point."""

import math

import numpy as np


def value_at(mask, y, x, *, outside):
    """Bilinear value at (y, x), cell centres at whole numbers; cells beyond the mask are `outside`."""
    cells = len(mask)

    def cell(row, column):
        if outside == "edge":
            row, column = min(max(row, 0), cells - 1), min(max(column, 0), cells - 1)
        elif not (0 <= row < cells and 0 <= column < cells):
            return 0.0
        return float(mask[row][column])

    top, left = math.floor(y), math.floor(x)
    down, across = y - top, x - left
    upper = (1 - across) * cell(top, left) + across * cell(top, left + 1)
    lower = (1 - across) * cell(top + 1, left) + across * cell(top + 1, left + 1)
    return (1 - down) * upper + down * lower


def mask_in_roi(mask, mask_box, roi, output_size):
    """The bilinear value of an object's mask at the centre of each bin, zero outside its box."""
    x1, y1, x2, y2 = (float(edge) for edge in mask_box)
    values = np.zeros((output_size, output_size))
    if x2 <= x1 or y2 <= y1:
        return values
    for row in range(output_size):
        for column in range(output_size):
            x = roi[0] + (roi[2] - roi[0]) * (column + 0.5) / output_size
            y = roi[1] + (roi[3] - roi[1]) * (row + 0.5) / output_size
            if x1 <= x <= x2 and y1 <= y <= y2:
                cells = len(mask)
                at = ((y - y1) / (y2 - y1) * cells - 0.5, (x - x1) / (x2 - x1) * cells - 0.5)
                values[row, column] = value_at(mask, *at, outside="edge")
    return values


def pasted_mask(mask, box, height, width):
    """The bilinear value of a mask at the centre of each pixel, running to zero outside its box."""
    x1, y1, x2, y2 = (float(edge) for edge in box)
    values = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            at = [
                (row + 0.5 - y1) / (y2 - y1) * len(mask) - 0.5,
                (column + 0.5 - x1) / (x2 - x1) * len(mask) - 0.5,
            ]
            values[row, column] = value_at(mask, *at, outside="zero")
    return values
