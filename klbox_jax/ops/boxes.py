"""Areas, overlaps and clipping of boxes.

Boxes are `x1, y1, x2, y2` with continuous edges: the width is x2 - x1. A box whose edges are reversed counts as
empty. In Detectron, a box covers the whole pixels from x1 to x2 and has the width x2 - x1 + 1: add 1 to its x2 and y2,
and areas and IoUs are the same as here. Compiled code has no other IoU than these; `evaluation/matching.py` has one in
float64, which equals that of pycocotools.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Smaller unions (square pixels) count as zero: the gradient divides by their square, which would overflow.
_MIN_UNION = 1e-12


def area(boxes: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """Returns the area of each box in square pixels, 0 for an empty one."""
    return jnp.maximum(boxes[:, 2] - boxes[:, 0], 0.0) * jnp.maximum(boxes[:, 3] - boxes[:, 1], 0.0)


def pairwise_intersection(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Returns the shared area of each box of `a` and each box of `b`, in square pixels."""
    width = jnp.minimum(a[:, None, 2], b[None, :, 2]) - jnp.maximum(a[:, None, 0], b[None, :, 0])
    height = jnp.minimum(a[:, None, 3], b[None, :, 3]) - jnp.maximum(a[:, None, 1], b[None, :, 1])
    return jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)


def pairwise_iou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Returns the intersection over union of each box of `a` and each box of `b`.

    Two empty boxes have IoU 0. Values and gradients are finite for every finite input.
    """
    intersection = pairwise_intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - intersection
    has_union = union > _MIN_UNION
    return jnp.where(has_union, intersection / jnp.where(has_union, union, 1.0), 0.0)


def paired_iou(a: tuple[Array, ...], b: tuple[Array, ...]) -> Float[Array, " n"]:
    """Returns the IoU of each row of `a` and the same row of `b`; each is its columns x1, y1, x2, y2, all `[n]`."""
    width = jnp.maximum(jnp.minimum(a[2], b[2]) - jnp.maximum(a[0], b[0]), 0.0)
    height = jnp.maximum(jnp.minimum(a[3], b[3]) - jnp.maximum(a[1], b[1]), 0.0)
    intersection = width * height

    def area_of(x1: Array, y1: Array, x2: Array, y2: Array) -> Array:
        return jnp.maximum(x2 - x1, 0.0) * jnp.maximum(y2 - y1, 0.0)

    union = area_of(*a) + area_of(*b) - intersection
    has_union = union > _MIN_UNION
    return jnp.where(has_union, intersection / jnp.where(has_union, union, 1.0), 0.0)


def clip_to_image(
    boxes: Float[Array, "n 4"], image_size: Int[Array, "2"], *, pixel: Float[Array, "2"] | None = None
) -> Float[Array, "n 4"]:
    """Moves edges outside the image onto its border.

    Args:
        boxes: in pixels.
        image_size: height, width.
        pixel: only for weights of Detectron. Width and height of a pixel: a box outside the image becomes its nearest
            pixel, because Detectron clips the first and the last pixel of a box to `0 .. width - 1`. Without it, such
            a box becomes empty.
    """
    height, width = image_size.astype(boxes.dtype)
    x1, y1, x2, y2 = boxes.T
    pixel_x, pixel_y = (0, 0) if pixel is None else pixel
    return jnp.stack(
        [
            jnp.clip(x1, 0, width - pixel_x),
            jnp.clip(y1, 0, height - pixel_y),
            jnp.clip(x2, pixel_x, width),
            jnp.clip(y2, pixel_y, height),
        ],
        axis=-1,
    )


def is_nonempty(boxes: Float[Array, "n 4"], *, min_size: float = 0.0) -> Bool[Array, " n"]:
    """Returns True for each box with both sides longer than `min_size` pixels."""
    return (boxes[:, 2] - boxes[:, 0] > min_size) & (boxes[:, 3] - boxes[:, 1] > min_size)
