"""Which cells of a box an object covers, point by point."""

import numpy as np


def covers(polygons, x, y):
    """Even-odd rule for each polygon by the angle its outline turns through around the point."""
    for polygon in polygons:
        turned = 0.0
        for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
            a, b = np.array([x1 - x, y1 - y]), np.array([x2 - x, y2 - y])
            turned += np.arctan2(a[0] * b[1] - a[1] * b[0], a @ b)
        if round(turned / (2 * np.pi)) % 2:
            return True
    return False


def picture(is_covered, box, mask_size):
    """1 for each cell of a box whose centre is covered."""
    x1, y1, x2, y2 = (float(edge) for edge in box)
    cells = np.zeros((mask_size, mask_size), np.uint8)
    for row in range(mask_size):
        for column in range(mask_size):
            x = x1 + (column + 0.5) / mask_size * (x2 - x1)
            y = y1 + (row + 0.5) / mask_size * (y2 - y1)
            cells[row, column] = is_covered(x, y)
    return cells
