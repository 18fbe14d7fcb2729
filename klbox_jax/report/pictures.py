"""Detections drawn over photographs, with a band around every edge for how sure it is."""

import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, told apart under the common colour-vision deficiencies; the dark blue comes last.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)
# Opacity of the band up to two and up to one standard deviation, and of the line itself.
_BANDS = ((2.0, 0.28), (1.0, 0.42))
_LINE_WIDTH = 2.0
_MIN_LONG_SIDE = 560


def draw_detections(
    image: UInt8[ndarray, "H W 3"],
    boxes: Float[ndarray, "n 4"],
    labels: Sequence[str],
    scores: Float[ndarray, " n"],
    stds: Float[ndarray, "n 4"] | None,
    *,
    gt_boxes: Float[ndarray, "g 4"] | None = None,
    class_names: Sequence[str] | None = None,
    scale: int | None = None,
) -> UInt8[ndarray, "h w 3"]:
    """The image with each box as a thin solid line inside its bands of one and two standard deviations.

    The bands are drawn to scale: the edge x1 has a darker band from x1 - s to x1 + s and a fainter one from
    x1 - 2s to x1 + 2s. True boxes are dashed white. Boxes that are not finite or lie wholly outside the
    image are left out.

    Args:
        image: RGB.
        boxes: `x1, y1, x2, y2` in pixels of `image`, continuous edges; later ones are drawn under earlier.
        labels: class name of each box.
        scores: score of each box, printed beside the label.
        stds: standard deviation of each edge in pixels of `image`, or None.
        gt_boxes: true boxes, or None.
        class_names: all class names in a fixed order, so that a class has one colour in all pictures;
            without it colours go by the alphabet within this picture.
        scale: enlarges the picture by a whole number, so that narrow bands can be seen; None enlarges
            small images until the long side has some 560 pixels.

    Returns:
        RGB of `scale` times the size.

    Raises:
        ValueError: not one label for each box, or a label that is not among `class_names`.
    """
    if len(labels) != len(boxes):
        raise ValueError(f"{len(labels)} labels for {len(boxes)} boxes")
    height, width = image.shape[:2]
    if scale is None:
        scale = max(1, math.ceil(_MIN_LONG_SIDE / max(height, width)))
    enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    # True boxes lie under the rest: where one agrees with a detection, the detection's line is seen.
    draw = ImageDraw.Draw(enlarged)
    limits = np.tile(enlarged.size, 2)
    for box in gt_boxes if gt_boxes is not None else ():
        if _is_visible(box, height, width):
            _draw_dashed(draw, np.clip(box * scale, -9, limits + 9))  # far outside, nothing shows
    canvas = np.asarray(enlarged).astype(np.float32)
    order = list(class_names) if class_names is not None else sorted(set(labels))
    if not set(labels) <= set(order):
        raise ValueError(f"labels {sorted(set(labels) - set(order))} are not among class_names")
    colors = [PALETTE[order.index(label) % len(PALETTE)] for label in labels]
    shown = [i for i in range(len(boxes)) if _is_visible(boxes[i], height, width)]

    for i in reversed(shown):
        box = boxes[i] * scale
        if stds is not None and np.isfinite(stds[i]).all():
            for multiple, opacity in _BANDS:
                _blend_frame(canvas, box, multiple * stds[i] * scale, colors[i], opacity)
        half_width = np.full(4, _LINE_WIDTH / 2)
        _blend_frame(canvas, box, half_width + 1.0, (0, 0, 0), 0.6)
        _blend_frame(canvas, box, half_width, colors[i], 1.0)

    picture = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    taken: list[tuple] = []
    for i in shown:
        _draw_tag(draw, picture.size, boxes[i] * scale, f"{labels[i]} {scores[i]:.2f}", colors[i], taken)
    return np.asarray(picture).copy()


def contact_sheet(
    images: Sequence[UInt8[ndarray, "_ _ 3"]],
    *,
    columns: int,
    captions: Sequence[str] | None = None,
    gap: int = 8,
) -> UInt8[ndarray, "h w 3"]:
    """The images on a white sheet, row by row, each centred in a cell of the largest one's size.

    Args:
        images: RGB, at least one, of any sizes.
        columns: images side by side, at least one.
        captions: a line above each image, or None.
        gap: white pixels between and around the cells.

    Raises:
        ValueError: no image, no column, or not one caption for each image.
    """
    if not images or columns < 1:
        raise ValueError(f"a sheet needs images and columns, not {len(images)} and {columns}")
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
            font = ImageFont.load_default(16)
            draw.text((x + cell_width / 2, y + 11), captions[i], fill=(20, 20, 20), font=font, anchor="mm")
        left = x + (cell_width - image.shape[1]) // 2
        top = y + caption_height + (cell_height - caption_height - image.shape[0]) // 2
        sheet.paste(Image.fromarray(image), (left, top))
    return np.asarray(sheet).copy()


def shrink(image: UInt8[ndarray, "H W 3"], *, long_side: int) -> UInt8[ndarray, "h w 3"]:
    """The image with its long side brought down to `long_side` pixels; a smaller one is returned as it is."""
    height, width = image.shape[:2]
    factor = long_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=2.0))


def save_picture(path: str | os.PathLike, image: UInt8[ndarray, "h w 3"]) -> None:
    """Writes the image in the format that the file's ending names, `.png` or `.jpg`; its folder must exist."""
    # JPEG without chroma subsampling, which would smear thin coloured lines.
    Image.fromarray(image).save(path, optimize=True, quality=85, subsampling=0)


def _is_visible(box: ndarray, height: int, width: int) -> bool:
    x1, y1, x2, y2 = box
    return bool(np.isfinite(box).all() and x1 < width and y1 < height and x2 > 0 and y2 > 0)


def _coverage(low: float, high: float, size: int) -> ndarray:
    """Which part of each pixel of a line lies in [low, high]."""
    pixels = np.arange(size)
    return np.clip(np.minimum(pixels + 1, high) - np.maximum(pixels, low), 0, 1)


def _blend_frame(canvas: ndarray, box: ndarray, margins: ndarray, color: tuple, opacity: float) -> None:
    """Blends a colour, in place, over all points within `margins` of an edge of the box.

    The frame is a box grown by the margins less one shrunk by them, so its four bands do not add up where
    they meet, and parts of pixels are counted as parts.
    """
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = box.tolist()
    left, top, right, bottom = margins.tolist()
    outer_x = _coverage(x1 - left, x2 + right, width)
    outer_y = _coverage(y1 - top, y2 + bottom, height)
    inner_x = _coverage(x1 + left, x2 - right, width)
    inner_y = _coverage(y1 + top, y2 - bottom, height)
    color = np.array(color, np.float32)[None, None]
    # Only the strips that the frame touches, which is what keeps a hundred boxes quick.
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
    """The window of `rows` and `columns` without the pixels that are wholly inside, as rectangles."""
    if inner_rows.start == inner_rows.stop or inner_columns.start == inner_columns.stop:
        return [(rows, columns)]
    return [
        (slice(rows.start, inner_rows.start), columns),
        (slice(inner_rows.stop, rows.stop), columns),
        (inner_rows, slice(columns.start, inner_columns.start)),
        (inner_rows, slice(inner_columns.stop, columns.stop)),
    ]


def _extent(line: ndarray) -> slice:
    """From the first to the last pixel of a line that is marked."""
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
    """Prints a label at a corner of the box, at the first place that is inside the picture and free."""
    font = ImageFont.load_default(14)
    text_left, text_top, text_right, text_bottom = font.getbbox(text)
    width, height = text_right - text_left + 6, text_bottom - text_top + 6
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
    draw.text((tag[0] + 3 - text_left, tag[1] + 3 - text_top), text, fill=ink, font=font)


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
