"""Drawing of detections on photographs, with a band around each edge that shows its std."""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw

from klbox_jax.report.fonts import text_line

# Okabe and Ito's colours, distinct under the common colour-vision deficiencies; the dark blue comes last.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)
# Width of each band in standard deviations, and its opacity.
_BANDS = ((2.0, 0.28), (1.0, 0.42))
_FADE = 0.7  # part of the opacity that a band loses if it covers its whole box, so that small objects stay visible
_LINE_WIDTH = 2.0
_MIN_LONG_SIDE = 560


@dataclasses.dataclass(frozen=True)
class LabeledBoxes:
    """Detections to draw, best scores first.

    Attributes:
        boxes: `x1, y1, x2, y2` in pixels of the image, continuous edges.
        labels: class name of each box, in any script; see `klbox_jax.report.fonts` for characters without a font.
        scores: printed next to the label.
        stds: standard deviation of each edge in pixels of the image, or None.

    Raises:
        ValueError: the number of labels differs from the number of boxes.
    """

    boxes: Float[ndarray, "n 4"]
    labels: Sequence[str]
    scores: Float[ndarray, " n"]
    stds: Float[ndarray, "n 4"] | None = None

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.boxes):
            raise ValueError(f"{len(self.labels)} labels for {len(self.boxes)} boxes")


def draw_detections(
    image: UInt8[ndarray, "H W 3"],
    detections: LabeledBoxes,
    *,
    gt_boxes: Float[ndarray, "g 4"] | None = None,
    class_names: Sequence[str] | None = None,
    scale: int | None = None,
) -> UInt8[ndarray, "h w 3"]:
    """Draws each box as a thin solid line inside its bands of one and two standard deviations.

    The bands are drawn to scale: the edge x1 has a darker band from x1 - s to x1 + s and a lighter one from x1 - 2s to
    x1 + 2s. The more of its box a band covers, the fainter it is, so that small objects stay visible. True boxes are
    dashed white lines. Boxes that are not finite or completely outside the image are left out.

    Args:
        image: RGB.
        detections: boxes with labels, scores and stds; later ones are drawn under earlier ones.
        gt_boxes: true boxes, or None.
        class_names: all class names in a fixed order, so that a class has the same colour in all pictures; without it,
            colours follow the alphabetical order of the labels in this picture.
        scale: integer factor that enlarges the picture, so that narrow bands are visible; None enlarges small images
            until the long side has at least 560 pixels.

    Returns:
        RGB picture of `scale` times the image size.

    Raises:
        ValueError: a label is not among `class_names`.
    """
    colors = _class_colors(detections.labels, class_names)
    height, width = image.shape[:2]
    if scale is None:
        scale = max(1, math.ceil(_MIN_LONG_SIDE / max(height, width)))
    enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    # True boxes are drawn first, so that a detection that agrees with one stays visible.
    draw = ImageDraw.Draw(enlarged)
    limits = np.tile(enlarged.size, 2)
    for box in gt_boxes if gt_boxes is not None else ():
        if _is_visible(box, height, width):
            _draw_dashed(draw, np.clip(box * scale, -9, limits + 9))  # nothing shows far outside

    canvas = np.asarray(enlarged).astype(np.float32)
    visible = [i for i, box in enumerate(detections.boxes) if _is_visible(box, height, width)]
    for i in reversed(visible):
        stds = None if detections.stds is None else detections.stds[i] * scale
        _blend_box(canvas, detections.boxes[i] * scale, stds, colors[i])

    picture = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    taken: list[tuple] = []
    for i in visible:
        text = f"{detections.labels[i]} {detections.scores[i]:.2f}"
        _draw_tag(draw, picture.size, detections.boxes[i] * scale, text, colors[i], taken)
    return np.asarray(picture).copy()


def _class_colors(labels: Sequence[str], class_names: Sequence[str] | None) -> list[tuple]:
    order = list(class_names) if class_names is not None else sorted(set(labels))
    if not set(labels) <= set(order):
        raise ValueError(f"labels {sorted(set(labels) - set(order))} are not among class_names")
    return [PALETTE[order.index(label) % len(PALETTE)] for label in labels]


def contact_sheet(
    images: Sequence[UInt8[ndarray, "_ _ 3"]],
    *,
    columns: int,
    captions: Sequence[str] | None = None,
    gap: int = 8,
) -> UInt8[ndarray, "h w 3"]:
    """Arranges images on a white sheet, row by row, each centred in a cell of the size of the largest image.

    Args:
        images: RGB, at least one, of any sizes.
        columns: number of images in a row, at least one.
        captions: one line of text above each image, or None.
        gap: white pixels between and around the cells.

    Raises:
        ValueError: no image, no column, or the number of captions differs from the number of images.
    """
    if not images or columns < 1:
        raise ValueError(
            f"a contact sheet needs at least 1 image and 1 column, not {len(images)} and {columns}"
        )
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    caption_height = 26 if captions is not None else 0
    cell_height = max(image.shape[0] for image in images) + caption_height
    cell_width = max(image.shape[1] for image in images)
    size = (gap + columns * (cell_width + gap), gap + rows * (cell_height + gap))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = gap + column * (cell_width + gap), gap + row * (cell_height + gap)
        if captions is not None:
            _draw_caption(draw, (x + cell_width / 2, y + 11), captions[i])
        left = x + (cell_width - image.shape[1]) // 2
        top = y + caption_height + (cell_height - caption_height - image.shape[0]) // 2
        sheet.paste(Image.fromarray(image), (left, top))
    return np.asarray(sheet).copy()


def shrink(image: UInt8[ndarray, "H W 3"], *, long_side: int) -> UInt8[ndarray, "h w 3"]:
    """Reduces an image to `long_side` pixels at its long side; returns a smaller image unchanged."""
    height, width = image.shape[:2]
    factor = long_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=2.0))


def save_picture(path: str | os.PathLike, image: UInt8[ndarray, "h w 3"]) -> None:
    """Writes an image as PNG or JPEG, by the suffix of the path (`.png` or `.jpg`); the folder must exist."""
    # JPEG without chroma subsampling, which would smear thin coloured lines.
    Image.fromarray(image).save(path, optimize=True, quality=85, subsampling=0)


def _is_visible(box: ndarray, height: int, width: int) -> bool:
    x1, y1, x2, y2 = box
    return bool(np.isfinite(box).all() and x1 < width and y1 < height and x2 > 0 and y2 > 0)


def _coverage(low: float, high: float, size: int) -> ndarray:
    """Returns the part of each pixel of a line that is inside [low, high]."""
    pixels = np.arange(size)
    return np.clip(np.minimum(pixels + 1, high) - np.maximum(pixels, low), 0, 1)


def _blend_box(canvas: ndarray, box: ndarray, stds: ndarray | None, color: tuple) -> None:
    """Blends the bands, a dark casing and the line of one box into the canvas, in place."""
    if stds is not None and np.isfinite(stds).all():
        strength = 1.0 - _FADE * _covered_share(box, _BANDS[0][0] * stds)
        for multiple, opacity in _BANDS:
            _blend_frame(canvas, box, multiple * stds, color, strength * opacity)
    half_width = np.full(4, _LINE_WIDTH / 2)
    _blend_frame(canvas, box, half_width + 1.0, (0, 0, 0), 0.6)
    _blend_frame(canvas, box, half_width, color, 1.0)


def _covered_share(box: ndarray, margins: ndarray) -> float:
    """Returns the share of the box within `margins` of one of its edges."""
    sides = box[2:] - box[:2]
    inner = np.maximum(sides - margins[:2] - margins[2:], 0.0)
    return 1.0 - float(inner.prod() / sides.prod()) if (sides > 0).all() else 1.0


def _blend_frame(canvas: ndarray, box: ndarray, margins: ndarray, color: tuple, opacity: float) -> None:
    """Blends a colour, in place, into all points within `margins` of an edge of the box.

    The frame is the box grown by the margins minus the box shrunk by them, so its four bands do not add up at the
    corners. Partly covered pixels get part of the colour.
    """
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = box.tolist()
    left, top, right, bottom = margins.tolist()
    outer_x = _coverage(x1 - left, x2 + right, width)
    outer_y = _coverage(y1 - top, y2 + bottom, height)
    inner_x = _coverage(x1 + left, x2 - right, width)
    inner_y = _coverage(y1 + top, y2 - bottom, height)
    color = np.array(color, np.float32)[None, None]
    # Only the strips that the frame touches: this keeps pictures of a hundred boxes fast.
    for rows, columns in _strips(
        _extent(outer_y > 0), _extent(outer_x > 0), _extent(inner_y == 1), _extent(inner_x == 1)
    ):
        outer = outer_y[rows][:, None] * outer_x[columns][None, :]
        inner = inner_y[rows][:, None] * inner_x[columns][None, :]
        weight = (opacity * (outer - inner)).astype(np.float32)[..., None]
        window = canvas[rows, columns]
        window += weight * (color - window)


def _strips(
    rows: slice, columns: slice, inner_rows: slice, inner_columns: slice
) -> list[tuple[slice, slice]]:
    """Returns rectangles that cover the window of `rows` and `columns` without its inner pixels."""
    if inner_rows.start == inner_rows.stop or inner_columns.start == inner_columns.stop:
        return [(rows, columns)]
    return [
        (slice(rows.start, inner_rows.start), columns),
        (slice(inner_rows.stop, rows.stop), columns),
        (inner_rows, slice(columns.start, inner_columns.start)),
        (inner_rows, slice(inner_columns.stop, columns.stop)),
    ]


def _extent(line: ndarray) -> slice:
    """Returns the range from the first to the last marked pixel of a line."""
    touched = np.flatnonzero(line)
    return slice(touched[0], touched[-1] + 1) if touched.size else slice(0, 0)


def _draw_dashed(draw: ImageDraw.ImageDraw, box: ndarray, *, dash: float = 7.0, gap: float = 6.0) -> None:
    x1, y1, x2, y2 = (float(edge) for edge in box)
    sides = (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x1, y2), (x2, y2)), ((x1, y1), (x1, y2)))
    for (ax, ay), (bx, by) in sides:
        length = math.hypot(bx - ax, by - ay)
        for k in range(math.ceil(length / (dash + gap))):
            begin = k * (dash + gap) / length
            end = min(1.0, begin + dash / length)
            points = [
                (ax + begin * (bx - ax), ay + begin * (by - ay)),
                (ax + end * (bx - ax), ay + end * (by - ay)),
            ]
            draw.line(points, fill=(0, 0, 0), width=4)
            draw.line(points, fill=(255, 255, 255), width=2)


def _draw_tag(
    draw: ImageDraw.ImageDraw, size: tuple, box: ndarray, text: str, color: tuple, taken: list[tuple]
) -> None:
    """Prints a label at the first free place at the corners of the box that is inside the picture."""
    line = text_line(text, size=14)
    left, top, right, bottom = line.box
    width, height = right - left + 6, bottom - top + 6
    x1, y1, x2, y2 = box
    places = [(x1, y1 - height - 1), (x1, y2 + 1), (x1 + 1, y1 + 1), (x2 - width, y2 - height - 1)]
    places = [
        (float(np.clip(x, 0, max(size[0] - width, 0))), float(np.clip(y, 0, max(size[1] - height, 0))))
        for x, y in places
    ]
    tags = [(x, y, x + width, y + height) for x, y in places]
    tag = next((tag for tag in tags if not any(_overlap(tag, other) for other in taken)), tags[0])
    taken.append(tag)
    draw.rectangle(tag, fill=color, outline=(0, 0, 0))
    # Perceived brightness decides between dark and light letters.
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = (0, 0, 0) if brightness > 110 else (255, 255, 255)
    line.draw(draw, (tag[0] + 3 - left, tag[1] + 3 - top), fill=ink)


def _draw_caption(draw: ImageDraw.ImageDraw, middle: tuple, text: str) -> None:
    line = text_line(text, size=16)
    left, _, right, _ = line.box
    line.draw(draw, (middle[0] - (left + right) / 2, middle[1] + 6), fill=(20, 20, 20))


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
