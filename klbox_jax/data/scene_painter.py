"""Paints a scene of textured objects from nothing but a seed, and knows everything about it.

A scene is a textured background with clutter and, back to front, one to eight objects. Every class has a
silhouette family and a texture family of its own, so that a half-hidden object still tells its class. An
object is a polygon: its box is the polygon's extent, exact and amodal (hidden parts count). Defocus and
motion blur act on the object's premultiplied layer, so that occlusion boundaries blend as in a photograph.

The standard deviation of the label noise of an edge is a fixed function of what is seen of that edge:

    std = sqrt(S0^2 + (C_BLUR * blur)^2 + (C_HIDDEN * hidden_share * side)^2)    in pixels

`blur` is the standard deviation of the edge's blur in pixels, `hidden_share` the share of the silhouette's
outermost strip at that edge which nearer objects hide, `side` the box's extent across the edge.

FROZEN: a change of this file makes another world, and results of the two worlds cannot be compared. The
tests pin its sha256; whoever changes it raises `VERSION` and runs every experiment anew.
"""

import colorsys
import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

VERSION = "1.0.0"
CLASS_NAMES = ("ellipse", "rectangle", "triangle", "star", "ring", "cross")
# Things have their usual colours: the hue of the lighter of an object's two colours, in turns, and its spread.
CLASS_HUES, HUE_SPREAD = (0.02, 0.13, 0.33, 0.5, 0.64, 0.84), 0.035

S0 = 0.5  # a click on the pixel grid (0.29) and the jitter of the hand (0.4)
C_BLUR = 0.74  # uniform over the 10-90 % ramp of a Gaussian edge, which is 2.56 blur wide: 2.56 / sqrt(12)
C_HIDDEN = 0.144  # a wholly hidden edge: uniform over half the side, 0.5 / sqrt(12)
STRIP_SHARE, STRIP_MIN = 0.15, 2.0  # depth of an edge's strip: share of the side, and pixels

MAX_OBJECTS = 8
MIN_VISIBLE = 0.4  # an object with less to see is taken out of the scene
MIN_SIDE, MAX_SIDE_SHARE = 12.0, 0.6  # pixels; share of the image
MARGIN = 4.0  # pixels between an object and the frame
BEHIND = 0.55  # probability of being placed behind an object that is there already
SUPERSAMPLING = 8  # subpixels of a mask, per pixel and axis


@dataclasses.dataclass(frozen=True)
class Scene:
    """A painted scene; objects from the nearest to the farthest, edges ordered `x1, y1, x2, y2`, pixels.

    Attributes:
        image: RGB.
        instances: 0 for the background, i + 1 where object i is what is seen (before blur).
        boxes: exact extent of each silhouette, hidden parts included.
        classes: index into `CLASS_NAMES`.
        box_stds: standard deviation of the label noise of each edge.
        noise: standard normal draw for each edge: a noisy box is `boxes + scale * box_stds * noise`.
        blur: standard deviation of the blur across each edge.
        edge_hidden: share of each edge's outermost strip that nearer objects hide.
        hidden: share of each silhouette's area that nearer objects hide.
    """

    image: UInt8[ndarray, "s s 3"]
    instances: UInt8[ndarray, "s s"]
    boxes: Float[ndarray, "n 4"]
    classes: Int[ndarray, " n"]
    box_stds: Float[ndarray, "n 4"]
    noise: Float[ndarray, "n 4"]
    blur: Float[ndarray, "n 4"]
    edge_hidden: Float[ndarray, "n 4"]
    hidden: Float[ndarray, " n"]


@dataclasses.dataclass
class _Object:
    """An object while it is being painted; `coverage` fills the pixels `left, top, ...` of the image."""

    class_index: int
    contours: list[ndarray]  # pixels of the image; the second one is a hole
    angle: float
    box: ndarray
    left: int
    top: int
    coverage: ndarray


def paint_scene(seed: tuple[int, ...], *, size: int = 192) -> Scene:
    """Paints one scene: a pure function of its arguments.

    Args:
        seed: entropy of the scene, for instance (seed of the data set, split, index).
        size: height and width of the image in pixels, at least 64.

    Returns:
        The scene, with one to eight objects.
    """
    pixels, labels = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    objects, hidden, edge_hidden, instances = _arrange(pixels, size)
    canvas = _background(pixels, size)
    blur = np.zeros((len(objects), 4))
    for i in reversed(range(len(objects))):
        canvas, blur[i] = _paint_object(pixels, canvas, objects[i])
    canvas += np.float32(0.008) * pixels.standard_normal((size, size, 1), np.float32)  # the sensor
    boxes = np.stack([o.box for o in objects])
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    stds = np.sqrt(S0**2 + (C_BLUR * blur) ** 2 + (C_HIDDEN * edge_hidden * sides) ** 2)
    return Scene(
        image=np.rint(np.clip(canvas, 0.0, 1.0) * 255.0).astype(np.uint8),
        instances=instances,
        boxes=boxes.astype(np.float32),
        classes=np.array([o.class_index for o in objects], np.int32),
        box_stds=stds.astype(np.float32),
        noise=labels.standard_normal((MAX_OBJECTS, 4))[: len(objects)].astype(np.float32),
        blur=blur.astype(np.float32),
        edge_hidden=edge_hidden.astype(np.float32),
        hidden=hidden.astype(np.float32),
    )


def noisy_boxes(scene: Scene, *, noise_scale: float = 1.0) -> Float[ndarray, "n 4"]:
    """Returns the boxes as an annotator would draw them, inside the image.

    Edges are moved by `noise_scale * box_stds * noise`. Where less than 4 pixels would be left of a side, the
    side is set to 4 pixels about its centre; at last a box that leaves the image is cut at the frame. Both
    are rare, and are the only departures from independent Gaussian noise.
    """
    boxes = scene.boxes + np.float32(noise_scale) * scene.box_stds * scene.noise
    low, high = boxes[:, :2], boxes[:, 2:]
    centre, half = (low + high) / 2, np.maximum((high - low) / 2, 2.0)
    narrow = high - low < 4.0
    limit = float(scene.image.shape[0])
    low = np.clip(np.where(narrow, centre - half, low), 0.0, limit - 4.0)
    high = np.clip(np.where(narrow, centre + half, high), 4.0, limit)
    return np.concatenate([low, high], axis=1).astype(np.float32)


# ---------------------------------------------------------------------------------------------- arrangement


def _circle(count: int, radius: float = 1.0) -> ndarray:
    turn = np.arange(count) * (2 * np.pi / count)
    return radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _unit_silhouette(rng: np.random.Generator, class_index: int) -> list[ndarray]:
    """Contours of the class's family about the origin, of extent 2 or so."""
    name = CLASS_NAMES[class_index]
    if name == "ellipse":
        return [_circle(120)]
    if name == "rectangle":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)]
    if name == "triangle":
        return [np.array([[rng.uniform(-0.7, 0.7), -1], [1, 1], [-1, 1]], float)]
    if name == "star":
        star = _circle(10)
        star[1::2] *= rng.uniform(0.42, 0.5)
        return [star]
    if name == "ring":
        return [_circle(120), _circle(120, rng.uniform(0.45, 0.58))]
    t = rng.uniform(0.3, 0.4)
    arm = np.array([[1, -t], [1, t], [t, t]])
    quarter = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])]


def _shape(rng: np.random.Generator, size: int) -> tuple[int, list[ndarray], float, ndarray]:
    """Returns class, contours with the box's corner at the origin, angle, and the box's width and height."""
    class_index = int(rng.integers(len(CLASS_NAMES)))
    unit = _unit_silhouette(rng, class_index)
    while True:
        aspect = np.exp(rng.uniform(-1, 1) * np.log(3.2) / 2)
        # Most things stand upright; some lie as they fell.
        angle = rng.normal(0, 0.08) if rng.random() < 0.8 else rng.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        contours = [(c * [aspect, 1 / aspect]) @ rotation for c in unit]
        low, high = contours[0].min(0), contours[0].max(0)
        side = np.exp(rng.uniform(np.log(20.0), np.log(0.56 * size)))
        scale = side / np.sqrt(np.prod(high - low))
        extent = (high - low) * scale
        if extent.min() >= MIN_SIDE and extent.max() <= MAX_SIDE_SHARE * size:
            return class_index, [(c - low) * scale for c in contours], angle, extent


def _coverage(contours: list[ndarray], left: int, top: int, width: int, height: int) -> ndarray:
    """Share of each pixel that the silhouette covers, float32 [height, width]."""
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    # fillPoly also paints half a subpixel beyond the outline: shrink it by as much at the extremes.
    low, high = contours[0].min(0), contours[0].max(0)
    centre, shrink = (low + high) / 2, 1 - 1 / (SUPERSAMPLING * (high - low))
    outlines = [centre + (contours[0] - centre) * shrink, *contours[1:]]
    # OpenCV's integer coordinates are pixel centres; four fractional bits.
    points = [np.rint(((c - [left, top]) * SUPERSAMPLING - 0.5) * 16).astype(np.int32) for c in outlines]
    cv2.fillPoly(fine, points, 255, shift=4)
    coarse = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return coarse.astype(np.float32) / np.float32(255)


def _arrange(rng: np.random.Generator, size: int) -> tuple[list[_Object], ndarray, ndarray, ndarray]:
    """Places objects from the nearest to the farthest and keeps those of which enough is seen.

    Returns:
        The kept objects, the hidden share of each, the hidden share of each edge's strip, the label map.
    """
    objects, hidden, edge_hidden = [], [], []
    instances = np.zeros((size, size), np.uint8)
    covered = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        class_index, contours, angle, extent = _shape(rng, size)
        behind, offset, place = rng.random() < BEHIND, rng.uniform(-1, 1, 2), rng.random(2)
        corner = MARGIN + place * (size - 2 * MARGIN - extent)
        if behind and objects:
            front = objects[int(rng.integers(len(objects)))].box
            reach = (front[2:] - front[:2] + extent) / 2
            corner = (front[:2] + front[2:] - extent) / 2 + 0.85 * offset * reach
            corner = np.clip(corner, MARGIN, size - MARGIN - extent)
        box = np.concatenate([corner, corner + extent])
        left, top = np.floor(box[:2]).astype(int).tolist()
        right, bottom = np.ceil(box[2:]).astype(int).tolist()
        contours = [c + corner for c in contours]
        coverage = _coverage(contours, left, top, right - left, bottom - top)
        window = np.s_[top:bottom, left:right]
        hiding = coverage * covered[window]
        share = hiding.sum() / coverage.sum()
        if share > 1 - MIN_VISIBLE:
            continue
        objects.append(_Object(class_index, contours, angle, box, left, top, coverage))
        hidden.append(share)
        edge_hidden.append(_edge_hidden(coverage, hiding, box - np.tile([left, top], 2)))
        instances[window][(coverage > 0.5) & (instances[window] == 0)] = len(objects)
        covered[window] = 1 - (1 - covered[window]) * (1 - coverage)
    return objects, np.array(hidden), np.array(edge_hidden), instances


def _edge_hidden(coverage: ndarray, hiding: ndarray, box: ndarray) -> ndarray:
    """Share of the outermost strip at each edge that is hidden; `box` relative to the mask's corner."""
    shares = np.zeros(4)
    for axis in (0, 1):
        low, high = box[axis], box[axis + 2]
        depth = max(STRIP_SHARE * (high - low), STRIP_MIN)
        profile, hidden_profile = coverage.sum(axis), hiding.sum(axis)
        pixel = np.arange(len(profile))
        for edge, start, stop in ((axis, low, low + depth), (axis + 2, high - depth, high)):
            weight = np.clip(np.minimum(pixel + 1, stop) - np.maximum(pixel, start), 0, 1)
            shares[edge] = (weight @ hidden_profile) / (weight @ profile)
    return shares


# ------------------------------------------------------------------------------------------------- painting


def _colour(
    rng: np.random.Generator,
    value: tuple[float, float],
    saturation: tuple[float, float],
    hue: float | None = None,
) -> ndarray:
    """A colour of the given hue in turns, or of any."""
    hue = rng.random() if hue is None else (hue + rng.normal(0, HUE_SPREAD)) % 1.0
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _noise(rng: np.random.Generator, size: int, finest: int, persistence: float) -> ndarray:
    """Value noise of several octaves, of mean 0 and standard deviation 1."""
    total = np.zeros((size, size), np.float32)
    cells, weight = 3, 1.0
    while cells <= finest:
        grid = rng.standard_normal((cells, cells), np.float32)
        total += np.float32(weight) * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        cells, weight = cells * 2, weight * persistence
    return (total - total.mean()) / (total.std() + np.float32(1e-6))


def _clutter(rng: np.random.Generator, canvas: ndarray) -> None:
    """Paints one crooked stroke or pebble, which belongs to no class, into the canvas [3, size, size]."""
    size = canvas.shape[1]
    colour, opacity, softness = (
        _colour(rng, (0.15, 0.95), (0.05, 0.7)),
        rng.uniform(0.35, 0.9),
        rng.uniform(0, 2.5),
    )
    centre, is_stroke, thickness = rng.uniform(0, size, 2), rng.random() < 0.5, int(rng.integers(1, 6))
    if is_stroke:
        points = np.cumsum(rng.normal(0, rng.uniform(8, 22), (int(rng.integers(2, 6)), 2)), axis=0)
    else:
        turn = np.arange(40) * (2 * np.pi / 40)
        lobes = rng.uniform(-0.25, 0.25, (4, 1)) * np.cos(
            np.arange(1, 5)[:, None] * turn + rng.uniform(0, 2 * np.pi, (4, 1))
        )
        radius = rng.uniform(4, 26) * (1 + lobes.sum(0))
        points = radius[:, None] * np.stack([np.cos(turn), rng.uniform(0.5, 1) * np.sin(turn)], axis=1)
    points = points + centre
    low = np.maximum(np.floor(points.min(0)).astype(int) - 9, 0)
    high = np.minimum(np.ceil(points.max(0)).astype(int) + 9, size)
    if (high <= low).any():
        return
    mask = np.zeros((high - low)[::-1], np.uint8)
    fixed = [np.rint((points - low) * 16).astype(np.int32)]
    if is_stroke:
        cv2.polylines(mask, fixed, False, 255, thickness, cv2.LINE_AA, 4)
    else:
        cv2.fillPoly(mask, fixed, 255, cv2.LINE_AA, 4)
    alpha = mask.astype(np.float32) * np.float32(opacity / 255)
    if softness > 0.5:
        alpha = cv2.GaussianBlur(alpha, (0, 0), softness)
    window = canvas[:, low[1] : high[1], low[0] : high[0]]
    window += alpha * (colour[:, None, None] - window)


def _background(rng: np.random.Generator, size: int) -> ndarray:
    """A ground of two colours mixed by noise, clutter, grain and uneven light; float32 [size, size, 3]."""
    first, second = (_colour(rng, (0.25, 0.85), (0.05, 0.55))[:, None, None] for _ in range(2))
    ground = 0.5 + 0.5 * np.tanh(
        _noise(rng, size, 96, rng.uniform(0.6, 0.95)) * np.float32(rng.uniform(0.5, 1.2))
    )
    canvas = first + ground * (second - first)
    for _ in range(int(rng.integers(4, 14))):
        _clutter(rng, canvas)
    light = 1 + np.float32(rng.uniform(0.1, 0.25)) * np.tanh(_noise(rng, size, 3, 1.0))
    grain = np.float32(rng.uniform(0.02, 0.07)) * rng.standard_normal((size, size), np.float32)
    return np.ascontiguousarray((canvas * light + grain).transpose(1, 2, 0))


def _texture(rng: np.random.Generator, class_index: int, u: ndarray, v: ndarray, period: float) -> ndarray:
    """Mix of the two colours, 0 to 1, of the class's family at the object's own coordinates, in pixels."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    a, b = ((w * (2 * np.pi / period) + p).astype(np.float32) for w, p in zip((u, v), phase, strict=True))
    name = CLASS_NAMES[class_index]
    if name == "ellipse":  # stripes
        wave = np.sin(a)
    elif name == "rectangle":  # checks
        wave = 2 * np.sin(a * 0.8) * np.sin(b * 0.8)
    elif name == "triangle":  # dots
        wave = np.cos(a) + np.cos(b) - 0.5
    elif name == "star":  # speckle
        grain = rng.standard_normal(
            (max(int(u.shape[0] / 2.2), 2), max(int(u.shape[1] / 2.2), 2)), np.float32
        )
        wave = 1.2 * cv2.resize(grain, u.shape[::-1], interpolation=cv2.INTER_CUBIC)
    elif name == "ring":  # a net of thin lines
        wave = 3 * np.maximum(np.cos(a * 0.7), np.cos(b * 0.7)) - 1.9
    else:  # chevrons
        wave = np.sin(a + 2.4 * np.arcsin(np.sin(b * 0.6)))
    return np.clip(0.5 + 0.25 * period * wave, 0, 1).astype(np.float32)


def _motion_kernel(length: float, direction: float) -> ndarray:
    """A segment of that length in pixels, as weights of sum 1."""
    reach = int(np.ceil(length / 2)) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    along = (np.arange(64) + 0.5) / 64 * length - length / 2
    x, y = along * np.cos(direction) + reach, along * np.sin(direction) + reach
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        np.add.at(kernel, (y0 + dy, x0 + dx), np.abs(1 - dx - (x - x0)) * np.abs(1 - dy - (y - y0)))
    return kernel / kernel.sum()


def _paint_object(rng: np.random.Generator, canvas: ndarray, obj: _Object) -> tuple[ndarray, ndarray]:
    """Paints the object over the canvas; returns the canvas and the blur across each edge."""
    width, height = obj.box[2:] - obj.box[:2]
    short = min(width, height)
    defocused, defocus = rng.random() < 0.4, min(rng.uniform(0.8, 5.0), 0.09 * short)
    moving, length = rng.random() < 0.26, min(rng.uniform(5.0, 18.0), 0.4 * short)
    direction = rng.uniform(0, np.pi)
    defocus, length = defocus * defocused, length * moving
    pad = int(np.ceil(3 * defocus + length / 2)) + 1

    rows, columns = obj.coverage.shape
    x = np.arange(-pad, columns + pad, dtype=np.float32)[None] + np.float32(
        obj.left + 0.5 - (obj.box[0] + obj.box[2]) / 2
    )
    y = np.arange(-pad, rows + pad, dtype=np.float32)[:, None] + np.float32(
        obj.top + 0.5 - (obj.box[1] + obj.box[3]) / 2
    )
    turned = obj.angle + rng.normal(0, 0.3)
    cos, sin = np.float32(np.cos(turned)), np.float32(np.sin(turned))
    u, v = cos * x + sin * y, cos * y - sin * x
    period = np.clip(0.2 * np.sqrt(width * height), 4.2, 11.0) * rng.uniform(0.85, 1.2)
    mix = _texture(rng, obj.class_index, u, v, period)

    window = canvas[obj.top : obj.top + rows, obj.left : obj.left + columns]
    under = np.array(cv2.mean(window)[:3])
    hue = CLASS_HUES[obj.class_index]
    pairs = [
        (_colour(rng, (0.7, 1.0), (0.35, 0.95), hue), _colour(rng, (0.05, 0.45), (0.2, 0.95)))
        for _ in range(4)
    ]
    pair = max(pairs, key=lambda p: np.abs((p[0] + p[1]) / 2 - under).sum())
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    sun = rng.uniform(0, 2 * np.pi)
    shade = 1 + np.float32(0.44 * np.cos(sun) / width) * x + np.float32(0.44 * np.sin(sun) / height) * y
    layer = np.empty((*mix.shape, 4), np.float32)
    alpha = cv2.copyMakeBorder(obj.coverage, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    for channel in range(3):
        mixed = first[channel] + mix * (second[channel] - first[channel])
        layer[:, :, channel] = np.clip(mixed * shade, 0, 1) * alpha
    layer[:, :, 3] = alpha
    if defocused:
        layer = cv2.GaussianBlur(layer, (0, 0), defocus, borderType=cv2.BORDER_CONSTANT)
    if moving:
        layer = cv2.filter2D(layer, -1, _motion_kernel(length, direction), borderType=cv2.BORDER_CONSTANT)

    size = canvas.shape[0]
    top, left = max(obj.top - pad, 0), max(obj.left - pad, 0)
    bottom, right = min(obj.top + rows + pad, size), min(obj.left + columns + pad, size)
    layer = layer[
        top - obj.top + pad : bottom - obj.top + pad, left - obj.left + pad : right - obj.left + pad
    ]
    window = canvas[top:bottom, left:right]
    window *= 1 - layer[:, :, 3:]
    window += layer[:, :, :3]
    across = np.sqrt(defocus**2 + (length * np.abs([np.cos(direction), np.sin(direction)])) ** 2 / 12)
    return canvas, np.tile(across, 2)
