"""Precise RoI pooling: the exact mean of the interpolated feature map over each bin.

Between the cells, the map is their bilinear interpolation, a product of tents as in RoIAlign. A bin is a rectangle, so
its integral is a product too: the integral of `tent(y - row)` over the bin's rows times that of `tent(x - column)` over
its columns. Nothing is sampled, so the pooled features are continuously differentiable in the box. IoU-Net needs that
to refine boxes by gradient ascent.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.ops.roi_pooling import pool_with_matrices

# Width of the narrowest bin, in cells. As a bin shrinks, its mean converges to the value at a point; dividing by
# a smaller width would only magnify rounding errors.
_MIN_BIN = 1e-3


def integration_matrix(
    starts: Float[Array, " r"], ends: Float[Array, " r"], *, length: int, output_size: int
) -> Float[Array, "r s length"]:
    """Returns the mean weight of each cell of an axis over each bin of each interval `[start, end]`.

    Intervals are in cells, and cell `i` has its centre at `i`. The weight is the integral of `tent(x - i)` over
    the bin divided by the bin's width. The map is zero outside, so the tents of the outermost cells fall to zero
    one cell beyond the border.
    """
    sides = jnp.maximum(ends - starts, _MIN_BIN * output_size)
    fractions = jnp.arange(output_size + 1, dtype=jnp.float32) / output_size
    edges = starts[:, None] + sides[:, None] * fractions[None, :]
    distances = edges[:, :, None] - jnp.arange(length, dtype=jnp.float32)[None, None, :]
    # A tent is two straight lines, 1 + d before the cell and 1 - d after it. The integral of a line is the length times
    # the value in the middle. That is the difference of the quadratic antiderivatives in factored form, so that narrow
    # bins do not subtract large numbers.
    rising, falling = jnp.clip(distances, -1.0, 0.0), jnp.clip(distances, 0.0, 1.0)
    integrals = jnp.diff(rising, axis=1) * (1.0 + _middles(rising)) + jnp.diff(falling, axis=1) * (
        1.0 - _middles(falling)
    )
    # Thousands of cells outside the map, a bin may have width 0 after rounding.
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
    """Computes the exact mean over each bin (PrRoI pooling; Jiang et al., IoU-Net, ECCV 2018, section 3.4).

    Continuously differentiable in the features and in the boxes, also for a box that is partly outside the map. With
    `aligned=False` it agrees with the reference implementation (vacancy/PreciseRoIPooling), whose map is also zero
    outside: a bin across the border is averaged with zeros, whereas `roi_align` repeats the border. One difference is
    on purpose: a box without width is a very narrow box at its first edge, as in `roi_align`; the reference returns
    zero. So the value and its gradient do not jump.

    Args:
        features: one image's feature map.
        boxes: RoIs in pixels of the canvas. A side shorter than `output_size / 1000` cells, or reversed, gets that
            length, and its second edge has no gradient.
        output_size: number of bins along each side.
        spatial_scale: feature cells per pixel, 1 / stride.
        aligned: cell `i` has its centre at pixel `(i + 0.5) * stride`, as everywhere in this package. If False, at
            pixel `i * stride`.
        weights: factor for each RoI; 0 removes a RoI.
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
    maps: dict[int, Float[Array, "_h _w c"]],
    boxes: Float[Array, "r 4"],
    map_index: Int[Array, " r"],
    *,
    output_size: int,
    aligned: bool = True,
) -> Float[Array, "r s s c"]:
    """Computes PrRoI pooling of each box from one of the maps of a pyramid.

    Every map pools every box, and a weight of zero removes the boxes of other maps: shapes stay fixed, and no
    feature is gathered.

    Args:
        maps: one image's feature maps, each under its stride in pixels.
        boxes: RoIs in pixels of the canvas.
        map_index: number of the map of each box, 0 for the smallest stride.
        output_size: number of bins along each side.
        aligned: see `precise_roi_pool`.
    """
    return sum(
        precise_roi_pool(
            features,
            boxes,
            output_size=output_size,
            spatial_scale=1.0 / stride,
            aligned=aligned,
            weights=(map_index == index).astype(jnp.float32),
        )
        for index, (stride, features) in enumerate(sorted(maps.items()))
    )


def _middles(edges: Float[Array, "r s1 length"]) -> Float[Array, "r s length"]:
    """Returns the middle of each pair of neighbours along the second axis."""
    return 0.5 * (edges[:, :-1] + edges[:, 1:])
