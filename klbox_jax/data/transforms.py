"""Resizing, flipping and padding of a decoded image and its annotation to the input of the network.

Plain NumPy on one image. Images are enlarged, and reduced down to one half, by linear interpolation, which uses every
pixel in this range and is the resizing of Detectron. Stronger reductions average areas (OpenCV's INTER_AREA, several
times slower). At exactly one half the two agree. In both, pixel `i` covers `[i, i + 1)`, as for the boxes. The image
is in the top left corner of its canvas, and the rest of the canvas is zero.
"""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from klbox_jax.data.masks import rasterize
from klbox_jax.data.source import DataError, Fault, Record
from klbox_jax.structures import Batch, GroundTruth

# Each thread of the loader resizes one image; threads of OpenCV would only compete with them for the cores.
cv2.setNumThreads(0)

# Lower limit of the standard deviation of a label, in pixels of the canvas.
MIN_BOX_STD = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Settings of the resizing, the augmentation and the canvases.

    Attributes:
        short_side: length in pixels that an image's shorter side is resized to, ...
        long_side: ... unless its longer side would exceed this length.
        canvases: `(height, width)` of each canvas. One executable is compiled for each canvas in use.
        max_gt: ground-truth slots of an image.
        flip: mirror half of the training images.
        scale_jitter: range of a factor on the size of each training image, drawn uniformly; the factor is reduced if
            the image would leave its canvas.
        mask_size: cells along each side of an object's mask, which covers its box; 0 for no masks.
        on_bad_record: treatment of an image that cannot be decoded during training: "stop" raises, "skip" replaces
            it by an image that is not valid.

    Raises:
        ValueError: a field is out of range.
    """

    short_side: int
    long_side: int
    canvases: tuple[tuple[int, int], ...]
    max_gt: int
    flip: bool = True
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    mask_size: int = 0
    on_bad_record: str = "stop"

    def __post_init__(self):
        if not 1 <= self.short_side <= self.long_side:
            raise ValueError(f"Need 1 <= short_side <= long_side, got {self.short_side}, {self.long_side}.")
        sides = [np.asarray(canvas) for canvas in self.canvases]
        if not sides or any(side.shape != (2,) or side.min() < 1 for side in sides):
            raise ValueError(f"canvases must be (height, width) pairs, all positive, got {self.canvases}.")
        if self.max_gt < 1:
            raise ValueError(f"max_gt must be positive, got {self.max_gt}.")
        low, high = self.scale_jitter
        if not 0 < low <= high:
            raise ValueError(f"scale_jitter must be (low, high), 0 < low <= high, got {self.scale_jitter}.")
        if self.mask_size < 0:
            raise ValueError(f"mask_size must not be negative, got {self.mask_size}.")
        if self.on_bad_record not in ("stop", "skip"):
            raise ValueError(f"on_bad_record must be stop or skip, got {self.on_bad_record!r}.")


def resized_size(
    height: int,
    width: int,
    *,
    short_side: int,
    long_side: int,
    factor: float = 1.0,
    canvas: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Returns the rounded `(height, width)` of the resized image.

    The scale is min(short_side / shorter side, long_side / longer side) * factor, reduced so that the image fits
    `canvas` if one is given.
    """
    scale = factor * min(short_side / min(height, width), long_side / max(height, width))
    if canvas is not None:
        scale = min(scale, canvas[0] / height, canvas[1] / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def choose_canvas(record: Record, preprocessing: Preprocessing) -> int:
    """Returns the index of the smallest canvas that holds the resized image (without jitter).

    Raises:
        DataError: no canvas holds it.
    """
    height, width = resized_size(
        record.height, record.width, short_side=preprocessing.short_side, long_side=preprocessing.long_side
    )
    fitting = [
        (canvas_height * canvas_width, index)
        for index, (canvas_height, canvas_width) in enumerate(preprocessing.canvases)
        if height <= canvas_height and width <= canvas_width
    ]
    if not fitting:
        raise DataError(
            Fault(
                kind="image fits no canvas",
                file=f"{record.file_name} (image {record.image_id})",
                what=f"is resized to {height} x {width} pixels, which fits none of the canvases "
                f"{preprocessing.canvases}",
                remedy="Add a canvas to config.data.canvases, or lower short_side or long_side.",
            )
        )
    return min(fitting)[1]


def max_gt_fault(record: Record, max_gt: int) -> Fault | None:
    """Returns the fault of an image with more objects than ground-truth slots, or None."""
    count = len(record.boxes)
    if count <= max_gt:
        return None
    return Fault(
        kind="more objects than max_gt",
        file=f"{record.file_name} (image {record.image_id})",
        what=f"has {count} objects, but max_gt is {max_gt}",
        remedy=f"Raise config.data.max_gt to {count} or more.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The size and orientation of an image on its canvas.

    Attributes:
        canvas: `(height, width)` of the canvas.
        new_size: `(height, width)` of the resized image.
        flip: mirror left and right.

    Raises:
        ValueError: the resized image does not fit the canvas.
    """

    canvas: tuple[int, int]
    new_size: tuple[int, int]
    flip: bool = False

    def __post_init__(self):
        if self.new_size[0] > self.canvas[0] or self.new_size[1] > self.canvas[1]:
            raise ValueError(f"An image of {self.new_size} does not fit the canvas {self.canvas}.")


def make_example(
    image: UInt8[ndarray, "h w 3"],
    record: Record,
    placement: Placement,
    *,
    max_gt: int,
    mask_size: int = 0,
    out: UInt8[ndarray, "H W 3"] | None = None,
) -> Batch:
    """Returns one image as an unbatched `Batch` of NumPy arrays.

    Args:
        image: the decoded file, RGB.
        record: its annotation, in pixels of the file.
        placement: size and orientation of the image on its canvas.
        max_gt: ground-truth slots.
        mask_size: cells along each side of a mask (0 or 1 each; all 0 in padded slots); 0 for no masks. If it is not
            0, the record must have segmentations.
        out: a canvas with any content, which is filled and used as `images`; by default a new one.

    Raises:
        DataError: the image has more than `max_gt` objects.
    """
    fault = max_gt_fault(record, max_gt)
    if fault is not None:
        raise DataError(fault)
    flip, (new_height, new_width) = placement.flip, placement.new_size
    pixels = np.empty((*placement.canvas, 3), np.uint8) if out is None else out
    _fill(pixels, image, new_size=placement.new_size, flip=flip)

    # Each axis is rounded separately, so each has its own scale.
    scale = np.array([new_width / record.width, new_height / record.height])
    scale_xyxy = np.tile(scale, 2)
    limits = np.tile([new_width, new_height], 2)
    boxes = np.clip(record.boxes.astype(np.float64) * scale_xyxy, 0, limits)
    if flip:
        boxes = flip_boxes(boxes, new_width)
    boxes = boxes.astype(np.float32)
    has_size = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)

    box_stds = None
    if record.box_stds is not None:
        scaled = np.maximum(record.box_stds * scale_xyxy, MIN_BOX_STD)
        box_stds = _padded(scaled[:, [2, 1, 0, 3]] if flip else scaled, max_gt, fill=1.0, dtype=np.float32)
    masks = None
    if mask_size:
        masks = np.zeros((max_gt, mask_size, mask_size), np.uint8)
        # A mask is relative to its box, and so moves and scales with it.
        for row, (segmentation, box) in enumerate(zip(record.segmentations, record.boxes, strict=True)):
            mask = rasterize(segmentation, box, mask_size=mask_size, height=record.height)
            masks[row] = mask[:, ::-1] if flip else mask
    gt = GroundTruth(
        boxes=_padded(boxes, max_gt, fill=(0.0, 0.0, 1.0, 1.0), dtype=np.float32),
        classes=_padded(record.classes, max_gt, fill=0.0, dtype=np.int32),
        is_crowd=_padded(record.is_crowd, max_gt, fill=False, dtype=np.bool_),
        valid=_padded(has_size, max_gt, fill=False, dtype=np.bool_),
        box_stds=box_stds,
        masks=masks,
    )
    return Batch(
        images=pixels,
        image_size=np.array(placement.new_size, np.int32),
        scale=scale.astype(np.float32),
        image_id=np.array(record.image_id, np.int32),
        valid=np.array(True),
        gt=gt,
    )


def make_blank_example(
    record: Record,
    placement: Placement,
    *,
    max_gt: int,
    mask_size: int = 0,
    out: UInt8[ndarray, "H W 3"] | None = None,
) -> Batch:
    """Returns the replacement of an image that cannot be read: black, without objects, and not valid.

    The arguments are those of `make_example`.
    """
    empty = dataclasses.replace(
        record,
        boxes=record.boxes[:0],
        classes=record.classes[:0],
        is_crowd=record.is_crowd[:0],
        box_stds=None if record.box_stds is None else record.box_stds[:0],
        segmentations=None if record.segmentations is None else (),
    )
    image = np.zeros((*placement.new_size, 3), np.uint8)
    example = make_example(image, empty, placement, max_gt=max_gt, mask_size=mask_size, out=out)
    return example.replace(valid=np.array(False))


def flip_boxes(boxes: Float[ndarray, "n 4"], width: float | int) -> Float[ndarray, "n 4"]:
    """Returns boxes mirrored left and right in an image of `width` pixels: x -> width - x."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2, y1, width - x1, y2], axis=1)


def _fill(
    canvas: UInt8[ndarray, "H W 3"],
    image: UInt8[ndarray, "h w 3"],
    *,
    new_size: tuple[int, int],
    flip: bool,
) -> None:
    """Writes the resized image and zeros into a canvas, without a copy, which would cost as much as the resizing."""
    (height, width), (new_height, new_width) = image.shape[:2], new_size
    canvas[new_height:] = 0
    canvas[:new_height, new_width:] = 0
    corner = canvas[:new_height, :new_width]
    if (height, width) == new_size:
        corner[:] = image
    else:
        is_much_smaller = 2 * new_height < height or 2 * new_width < width
        interpolation = cv2.INTER_AREA if is_much_smaller else cv2.INTER_LINEAR
        cv2.resize(image, (new_width, new_height), dst=corner, interpolation=interpolation)
    if flip:
        # NumPy's `[:, ::-1]` moves single pixels, which takes longer than decoding the file.
        cv2.flip(corner, 1, dst=corner)


def _padded(rows: ndarray, length: int, *, fill: float | bool | tuple[float, ...], dtype: type) -> ndarray:
    padded = np.empty((length, *rows.shape[1:]), dtype)
    padded[: len(rows)] = rows
    padded[len(rows) :] = fill
    return padded
