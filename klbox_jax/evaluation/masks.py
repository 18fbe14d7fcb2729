"""Pasting of box-sized masks into the image, and their COCO run-length encoding."""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from pycocotools import mask as pycocotools_mask

from klbox_jax.structures import AnyArray


def paste_mask(
    probabilities: Float[AnyArray, "m m"],
    box: Float[AnyArray, "4"],
    *,
    height: int,
    width: int,
    threshold: float = 0.5,
) -> Bool[ndarray, "height width"]:
    """Returns the pixels of an image whose mask probability is at least the threshold.

    Samples the mask at each pixel centre, with bilinear interpolation between the centres of its cells and towards
    zero outside the box, like detectron2's `paste_masks_in_image`. torchvision's version rounds the box to whole
    pixels and includes the last one, so it draws a full mask over `[10, 38]` on 29 pixels instead of 28.

    Args:
        probabilities: mask that fills the box.
        box: `x1, y1, x2, y2` in pixels of the image; may extend beyond it. A box without area covers no pixel.
        height: of the image in pixels.
        width: of the image in pixels.
        threshold: least probability of a pixel of the object, above 0.
    """
    x1, y1, x2, y2 = np.asarray(box, np.float64)
    mask = np.asarray(probabilities, np.float64)
    pasted = np.zeros((height, width), bool)
    if x2 > x1 and y2 > y1:
        row, rows = _interpolation(y1, y2, cells=mask.shape[0], length=height)
        column, columns = _interpolation(x1, x2, cells=mask.shape[1], length=width)
        values = rows @ mask @ columns.T
        pasted[row : row + len(rows), column : column + len(columns)] = values >= threshold
    return pasted


def encode_masks(
    probabilities: Float[AnyArray, "d m m"], boxes: Float[AnyArray, "d 4"], *, height: int, width: int
) -> list[dict]:
    """Returns the masks of one image as COCO's compressed run lengths, ready for JSON.

    Args:
        probabilities: masks, each filling its box.
        boxes: in pixels of the image.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    encoded = []
    for mask, box in zip(np.asarray(probabilities), np.asarray(boxes), strict=True):
        pasted = paste_mask(mask, box, height=height, width=width)
        rle = pycocotools_mask.encode(np.asfortranarray(pasted, np.uint8))
        encoded.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return encoded


def _interpolation(
    start: float, end: float, *, cells: int, length: int
) -> tuple[int, Float[ndarray, "_pixels cells"]]:
    """Returns the first pixel of an axis that the mask can reach, and the cell weights of the pixels from there on."""
    # The interpolation towards zero ends half a cell outside the box.
    margin = 0.5 * (end - start) / cells
    first = int(np.clip(np.floor(start - margin), 0, length))
    last = int(np.clip(np.ceil(end + margin), first, length))
    positions = (np.arange(first, last) + 0.5 - start) / (end - start) * cells - 0.5
    distance = positions[:, None] - np.arange(cells)[None, :]
    return first, np.maximum(0.0, 1.0 - np.abs(distance))
