"""A mirrored image and its boxes, one pixel and one box at a time."""

import numpy as np


def mirrored_image(image, width):
    """The first `width` pixels of every row from right to left."""
    result = image.copy()
    for row in range(image.shape[0]):
        for column in range(width):
            result[row, column] = image[row, width - 1 - column]
    return result


def boxes_in_the_image(coding, deltas, proposals, width, *, weights):
    """Boxes decoded from the mirrored proposals and mirrored back to the image, in pixels."""
    result = np.zeros_like(deltas)
    for row, proposal in enumerate(proposals):
        side_x, side_y = proposal[2] - proposal[0], proposal[3] - proposal[1]
        for column, delta in enumerate(deltas[row]):
            d = [delta[i] / weights[i] for i in range(4)]
            if coding == "corner":
                x1, x2 = proposal[0] + d[0] * side_x, proposal[2] + d[2] * side_x
                y1, y2 = proposal[1] + d[1] * side_y, proposal[3] + d[3] * side_y
            else:
                x, half = proposal[0] + side_x / 2 + d[0] * side_x, side_x * np.exp(d[2]) / 2
                x1, x2 = x - half, x + half
                y, half = proposal[1] + side_y / 2 + d[1] * side_y, side_y * np.exp(d[3]) / 2
                y1, y2 = y - half, y + half
            # x in the mirrored image is width - x in the image, so the right edge becomes the left one.
            result[row, column] = [width - x2, y1, width - x1, y2]
    return result
