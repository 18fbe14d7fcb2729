"""Segmentations in COCO's forms (polygons and run lengths), and their rasterization inside a box.

Both forms are kept in memory unchanged, which is small, and drawn when an example is made. A sampled point of a mask
is 1 if the object covers it: for polygons by the even-odd rule within each polygon and the union over polygons, for
run lengths by the pixel that contains the point (pixel `i` covers `[i, i + 1)`). So a mask follows any resize of its
image, and a flip mirrors it, without error.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from pycocotools import mask as pycocotools_mask

# Far above any drawn outline. Rasterization takes memory for each point, and pycocotools for each step along an
# outline.
MAX_POINTS = 100_000
MAX_OUTLINE = 100  # times the width and height of the image

Polygons = tuple[Float[ndarray, "_ 2"], ...]
RunLengths = Int[ndarray, " _"]
# Polygons as rows `x, y` in pixels of the file; or the lengths of alternating runs of pixels outside and inside
# the object, in column order, which sum to the number of pixels of the file.
Segmentation = Polygons | RunLengths


def parse_segmentation(value: Any, *, height: int, width: int) -> Polygons | RunLengths:
    """Checks a segmentation in the form of COCO's JSON and returns it.

    Args:
        value: a list of polygons `[x1, y1, x2, y2, ...]`, of which those of less than three points are left out if
            there are others, or `{"size": [height, width], "counts": ...}` with
            counts as a list (uncompressed) or as text or bytes (compressed).
        height: height of the image in pixels.
        width: width of the image in pixels.

    Raises:
        ValueError: it is missing or malformed; the message gives the reason as the end of a sentence.
    """
    if value is None or value == []:
        raise ValueError("nothing")
    if isinstance(value, list):
        if sum(len(polygon) for polygon in value if isinstance(polygon, list)) > 2 * MAX_POINTS:
            raise ValueError(f"polygons of more than {MAX_POINTS} points")
        # Points and lines, which tools leave next to the polygons of an object, cover nothing.
        drawn = [polygon for polygon in value if not _has_no_area(polygon)]
        return tuple(_parse_polygon(polygon, height=height, width=width) for polygon in drawn or value)
    if not isinstance(value, dict) or not {"size", "counts"} <= value.keys():
        raise ValueError("neither polygons nor run lengths with 'size' and 'counts'")
    size, counts = value["size"], value["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"run lengths for another size than the image's {height} x {width} (height x width)")
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or (counts and not 0 <= min(counts) <= max(counts) < 2**31):
            raise ValueError("run lengths that are not whole numbers from 0 on")
        runs = np.array(counts, np.int64)
    elif isinstance(counts, (str, bytes)):
        runs = _decompress(counts)
    else:
        raise ValueError("run lengths that are neither a list nor a text")
    if runs.sum() != height * width:
        raise ValueError(f"run lengths of {runs.sum()} pixels in an image of {height * width}")
    return runs.astype(np.int32)


def _has_no_area(polygon: Any) -> bool:
    """Returns True for a polygon of two points or less."""
    return isinstance(polygon, list) and len(polygon) in (0, 2, 4) and set(map(type, polygon)) <= {int, float}


def _parse_polygon(polygon: Any, *, height: int, width: int) -> Float[ndarray, "_ 2"]:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon that is not a list of three or more points x1, y1, x2, y2, ...")
    if not set(map(type, polygon)) <= {int, float}:
        raise ValueError("a polygon with a coordinate that is not a number")
    points = np.empty((len(polygon) // 2, 2))
    try:
        points.flat = polygon
    except OverflowError:  # Python's JSON reader lets integers beyond any float through.
        points[:] = np.inf
    # pycocotools draws a polygon in steps along its outline: with a far point it would never finish.
    if not (np.abs(points) <= 2.0 * max(height, width)).all():  # also where a coordinate is NaN
        raise ValueError("a polygon that is not finite or leads far out of its image")
    steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
    if steps.sum() > MAX_OUTLINE * (height + width):
        raise ValueError("a polygon with an absurdly long outline")
    return points


def _decompress(counts: str | bytes) -> Int[ndarray, " _"]:
    """Returns the run lengths of COCO's compressed form; raises ValueError.

    Each number is written in two's complement as groups of five bits, lowest first, one character for each group
    (48 + bits, + 32 if more groups follow). From the fourth number on, the difference to the number two places before
    is stored.
    """
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        raise ValueError("compressed run lengths with a character outside their alphabet") from None
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not groups.size or groups.min() < 0 or groups.max() > 63:
        raise ValueError("compressed run lengths with a character outside their alphabet, or none")
    ends = np.flatnonzero(groups < 32)  # the last character of each number
    starts = np.concatenate([[0], ends[:-1] + 1])
    if not ends.size or ends[-1] != len(groups) - 1 or (ends - starts).max() > 6:
        raise ValueError("compressed run lengths that break off inside a number")
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((groups & 31) << shifts, starts)
    is_negative = groups[ends] & 16 > 0
    numbers -= is_negative.astype(np.int64) << (shifts[ends] + 5)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    if numbers.min() < 0 or numbers.max() >= 2**31:
        raise ValueError("compressed run lengths that are negative or absurdly long")
    return numbers


def run_lengths(mask: Bool[ndarray, "h w"]) -> RunLengths:
    """Returns the run lengths of a mask of the whole image, as `Record.segmentations` holds them."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    first = [0] if pixels.size and pixels[0] else []  # the first run is one outside the object
    return np.diff(np.concatenate([first, [0], changes, [pixels.size]])).astype(np.int32)


def rasterize(
    segmentation: Polygons | RunLengths,
    box: Float[ndarray, "4"],
    *,
    mask_size: int,
    height: int,
) -> UInt8[ndarray, "m m"]:
    """Returns the mask of an object inside a box: 1 in the cells whose centre the object covers.

    Args:
        segmentation: in pixels of the file.
        box: `x1, y1, x2, y2` in pixels of the file, inside the image; it is divided into `mask_size` x `mask_size`
            cells.
        mask_size: cells along each side of the box.
        height: height of the file in pixels.
    """
    x1, y1, x2, y2 = box.astype(np.float64)
    centres = (np.arange(mask_size) + 0.5) / mask_size
    xs, ys = x1 + centres * (x2 - x1), y1 + centres * (y2 - y1)
    if isinstance(segmentation, tuple):
        inside = np.zeros((mask_size, mask_size), bool)
        for polygon in segmentation:
            inside |= _inside_polygon(polygon, xs, ys)
        return inside.astype(np.uint8)
    pixels = np.floor(xs).astype(np.int64)[None] * height + np.floor(ys).astype(np.int64)[:, None]
    run = np.searchsorted(np.cumsum(segmentation), pixels, side="right")
    return (run % 2).astype(np.uint8)


def _inside_polygon(
    polygon: Float[ndarray, "n 2"], xs: Float[ndarray, " w"], ys: Float[ndarray, " h"]
) -> Bool[ndarray, "h w"]:
    """Returns True for the grid points inside a polygon: an odd number of edges cross the row to the left of them."""
    start, end = polygon, np.roll(polygon, -1, axis=0)
    edge, row = np.nonzero((start[:, 1, None] <= ys) != (end[:, 1, None] <= ys))
    slope = (end[edge, 0] - start[edge, 0]) / (end[edge, 1] - start[edge, 1])
    crossing = start[edge, 0] + (ys[row] - start[edge, 1]) * slope
    first = np.searchsorted(xs, crossing)  # the first point of the row that is not left of the crossing
    stride = len(xs) + 1
    crossings = np.bincount(row * stride + first, minlength=len(ys) * stride).reshape(len(ys), stride)
    return np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1


def to_coco(segmentation: Polygons | RunLengths, *, height: int, width: int) -> list | dict:
    """Returns a segmentation in the form of COCO's JSON, as plain Python: polygons, or uncompressed run lengths."""
    if isinstance(segmentation, tuple):
        return [polygon.ravel().tolist() for polygon in segmentation]
    return {"size": [height, width], "counts": segmentation.tolist()}


def to_compressed_rle(value: Any, *, height: int, width: int) -> dict:
    """Returns a segmentation in any of COCO's forms as the compressed run lengths of the whole image.

    pycocotools draws the polygons, as in COCO's own evaluation. Arguments and errors are those of
    `parse_segmentation`.
    """
    parsed = parse_segmentation(value, height=height, width=width)
    if isinstance(value, dict):
        if not isinstance(value["counts"], list):
            return {"size": [height, width], "counts": value["counts"]}
        return pycocotools_mask.frPyObjects(to_coco(parsed, height=height, width=width), height, width)
    drawn = pycocotools_mask.frPyObjects(to_coco(parsed, height=height, width=width), height, width)
    return pycocotools_mask.merge(drawn)
