"""Areas, overlaps and clipping of boxes.

Boxes are `x1, y1, x2, y2` with continuous edges: the width is x2 - x1, nothing is added to it. Whole pixels from
x1 to x2, which Detectron calls `x2 - x1 + 1` wide, are the box that ends at `x2 + 1`: areas and IoUs are then its
own. A box whose edges are reversed counts as empty. The IoUs here are the only ones of the compiled code;
`evaluation/matching.py` has one in float64, as pycocotools computes it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Unions below this (square pixels) count as zero: dividing by their square would overflow in the gradient.
_MIN_UNION = 1e-12


def area(boxes: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """The area of each box in square pixels, 0 for an empty one."""
    return jnp.maximum(boxes[:, 2] - boxes[:, 0], 0.0) * jnp.maximum(boxes[:, 3] - boxes[:, 1], 0.0)


def pairwise_intersection(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """The area shared by each box of `a` with each box of `b`, in square pixels."""
    width = jnp.minimum(a[:, None, 2], b[None, :, 2]) - jnp.maximum(a[:, None, 0], b[None, :, 0])
    height = jnp.minimum(a[:, None, 3], b[None, :, 3]) - jnp.maximum(a[:, None, 1], b[None, :, 1])
    return jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)


def pairwise_iou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of each box of `a` with each box of `b`.

    Two empty boxes have IoU 0. The values and their gradients are finite for every finite input.
    """
    intersection = pairwise_intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - intersection
    has_union = union > _MIN_UNION
    return jnp.where(has_union, intersection / jnp.where(has_union, union, 1.0), 0.0)


def paired_iou(a: tuple[Array, ...], b: tuple[Array, ...]) -> Float[Array, " n"]:
    """`pairwise_iou` of the boxes that stand in the same row, from their columns x1, y1, x2 and y2, each `[n]`."""
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
    """Moves edges that lie outside the image onto its border.

    Args:
        boxes: in pixels.
        image_size: height, width.
        pixel: width and height of what is left of a box beside the image: its nearest pixel, in Detectron, which
            clips the first and the last pixel of a box to `0 .. width - 1`. Nothing is left if None.
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
    """True where both sides of a box are longer than `min_size` pixels."""
    return (boxes[:, 2] - boxes[:, 0] > min_size) & (boxes[:, 3] - boxes[:, 1] > min_size)
