"""Precise RoI pooling: the exact mean of the interpolated feature map over each bin.

The map between the cells is their bilinear interpolation, a product of tents as in RoIAlign. A bin is a
rectangle, so its integral is a product as well: the integral of `tent(y - row)` over the bin's rows times that
of `tent(x - column)` over its columns. Nothing is sampled, and an edge of a box that moves by a little changes
the result by a little: the pooled features are continuously differentiable in the box, which is what lets
IoU-Net refine boxes by gradient ascent.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from klbox_jax.ops.roi_pooling import assign_boxes_to_levels, pool_with_matrices, trim_boxes

# Narrowest bin, in cells. The mean over a bin tends to the value at a point as the bin shrinks; dividing by
# the width of an even narrower one would only magnify rounding.
_MIN_BIN = 1e-3


def integration_matrix(
    starts: Float[Array, " r"], ends: Float[Array, " r"], *, length: int, output_size: int
) -> Float[Array, "r s length"]:
    """Returns the mean weight of each cell of an axis over each bin of each interval `[start, end]`.

    Intervals are in cells, cell `i` having its centre at `i`. The weight is the integral of `tent(x - i)` over
    the bin divided by the bin's width. Outside the map there is nothing, so that the tents of the outermost
    cells fall to zero one cell beyond the border.
    """
    sides = jnp.maximum(ends - starts, _MIN_BIN * output_size)
    fractions = jnp.arange(output_size + 1, dtype=jnp.float32) / output_size
    edges = starts[:, None] + sides[:, None] * fractions[None, :]
    distances = edges[:, :, None] - jnp.arange(length, dtype=jnp.float32)[None, None, :]
    # A tent is two straight lines, 1 + d up to the cell and 1 - d beyond it. The integral of a line is the
    # length times the value in the middle: the difference of the quadratic antiderivatives, factored, so that
    # narrow bins do not subtract large numbers.
    rising, falling = jnp.clip(distances, -1.0, 0.0), jnp.clip(distances, 0.0, 1.0)
    integrals = jnp.diff(rising, axis=1) * (1.0 + _middles(rising)) + jnp.diff(falling, axis=1) * (
        1.0 - _middles(falling)
    )
    # Thousands of cells outside the map, rounding may leave a bin without any width.
    widths = jnp.maximum(jnp.diff(edges, axis=1), 0.5 * _MIN_BIN)
    return integrals / widths[:, :, None]


def precise_roi_pool(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    output_size: int,
    spatial_scale: float,
    aligned: bool = True,
    weights: Float[Array, " r"] | None = None,
) -> Float[Array, "r s s c"]:
    """PrRoI pooling (Jiang et al., IoU-Net, ECCV 2018, section 3.4): the mean over each bin, exactly.

    Continuously differentiable in the features and in the boxes, also where a box leaves the map. With
    `aligned=False` it agrees with the reference implementation (vacancy/PreciseRoIPooling), whose map is
    likewise zero outside: a bin across the border is averaged with zeros, where `roi_align` repeats the border.
    On purpose unlike the reference, a box without width is read as a very narrow one at its first edge, as
    `roi_align` reads it, not as zero: the value and its gradient then have no cliff.

    Args:
        features: one image's feature map.
        boxes: RoIs in pixels of the canvas; a side shorter than `output_size / 1000` cells, or reversed, counts
            as that long, and no gradient reaches its second edge.
        output_size: bins along each side.
        spatial_scale: feature cells per pixel, 1 / stride.
        aligned: cell `i` has its centre at pixel `(i + 0.5) * stride`, as everywhere in this package. Without
            it, at pixel `i * stride`.
        weights: factor for each RoI; 0 leaves a RoI out.
    """
    h, w, _ = features.shape
    offset = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = jnp.moveaxis(boxes.astype(jnp.float32) * spatial_scale - offset, -1, 0)
    rows = integration_matrix(y1, y2, length=h, output_size=output_size)
    columns = integration_matrix(x1, x2, length=w, output_size=output_size)
    if weights is not None:
        rows = rows * weights[:, None, None]
    return pool_with_matrices(features, rows, columns)


def multilevel_precise_roi_pool(
    features: Sequence[Float[Array, "_h _w c"]],
    boxes: Float[Array, "r 4"],
    *,
    strides: Sequence[int],
    output_size: int,
    min_level: int,
    canonical_box_size: float = 224.0,
    canonical_level: int = 4,
    aligned: bool = True,
    trim: float = 0.0,
) -> Float[Array, "r s s c"]:
    """PrRoI pooling of each box from the pyramid level that fits its size.

    Every level pools every box, and a weight of zero takes out those that belong elsewhere: shapes stay fixed, and no
    feature is gathered. The level is a step function of the box: the gradient is that of the box's present level, and
    the value jumps where a box grows into the next one.

    Args:
        features: one image's maps, finest first.
        boxes: RoIs in pixels of the canvas.
        strides: pixels per cell of each map.
        output_size, aligned: as in `precise_roi_pool`.
        min_level, canonical_box_size, canonical_level: as in `assign_boxes_to_levels`.
        trim: pixels by which the pooled region ends before the box that chose the level.
    """
    levels = assign_boxes_to_levels(
        boxes,
        min_level=min_level,
        max_level=min_level + len(features) - 1,
        canonical_box_size=canonical_box_size,
        canonical_level=canonical_level,
    )
    return sum(
        precise_roi_pool(
            level_features,
            trim_boxes(boxes, trim),
            output_size=output_size,
            spatial_scale=1.0 / stride,
            aligned=aligned,
            weights=(levels == index).astype(jnp.float32),
        )
        for index, (level_features, stride) in enumerate(zip(features, strides, strict=True))
    )


def _middles(edges: Float[Array, "r s1 length"]) -> Float[Array, "r s length"]:
    """The middle of each two neighbours along the second axis."""
    return 0.5 * (edges[:, :-1] + edges[:, 1:])
