"""Resizing, flipping and choosing a canvas, one box and one pixel at a time, in exact fractions."""

from fractions import Fraction


def resized_size(height, width, short_side, long_side):
    # The shorter side becomes `short_side`, unless the longer would pass `long_side`: then that becomes it.
    scale = Fraction(short_side, min(height, width))
    if max(height, width) * scale > long_side:
        scale = Fraction(long_side, max(height, width))
    rounded = []
    for side in (height, width):
        exact = side * scale
        whole = exact.numerator // exact.denominator
        rounded.append(max(1, whole + (1 if exact - whole >= Fraction(1, 2) else 0)))
    return tuple(rounded)


def smallest_canvas(size, canvases):
    best = None
    for index, canvas in enumerate(canvases):
        if canvas[0] < size[0] or canvas[1] < size[1]:
            continue
        if best is None or canvas[0] * canvas[1] < canvases[best][0] * canvases[best][1]:
            best = index
    return best


def placed_box(box, file_size, new_size, flip):
    """Moves the four edges of a box from the file to the canvas; sizes are (height, width)."""
    x1, y1, x2, y2 = (Fraction(float(edge)) for edge in box)
    left, right = x1 * new_size[1] / file_size[1], x2 * new_size[1] / file_size[1]
    top, bottom = y1 * new_size[0] / file_size[0], y2 * new_size[0] / file_size[0]
    if flip:
        distance_left = new_size[1] - right
        distance_right = new_size[1] - left
        left, right = distance_left, distance_right
    return [float(edge) for edge in (left, top, right, bottom)]
