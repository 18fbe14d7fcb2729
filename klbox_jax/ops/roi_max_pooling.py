"""RoI max pooling of Fast R-CNN, with tables of maxima instead of a search in each bin.

The maximum over a range of cells is the larger of two maxima over ranges whose length is a power of two, one from
each end. These maxima are tabulated once for all RoIs; then a bin of any size needs four look-ups.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def roi_max_pool(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    output_size: int,
    spatial_scale: float,
) -> Float[Array, "r s s c"]:
    """Takes the maximum over each of `output_size` x `output_size` bins (Girshick, ICCV 2015, section 2.1).

    Agrees with Caffe and `torchvision.ops.roi_pool`: a RoI covers the cells from its rounded first to its rounded
    second corner, both included, and at least one cell. Of its `n` cells along an axis, bin `p` of `s` covers
    those from `floor(p * n / s)` up to, not including, `ceil((p + 1) * n / s)`. This is computed in integers here.
    The others compute it in float32, which rounds past a whole number at a few lengths, so that a bin reads
    one cell more (with 7 bins and up to 200 cells: 57, 114 and 121 cells). A bin outside the map is zero.

    Differentiable in the features, not in the boxes. Holds about `log2(h) * log2(w)` copies of the map.

    Args:
        features: one image's feature map.
        boxes: RoIs in pixels of the canvas.
        output_size: number of bins along each side.
        spatial_scale: feature cells per pixel, 1 / stride.
    """
    h, w, _ = features.shape
    x1, y1, x2, y2 = jnp.moveaxis(_round(boxes.astype(jnp.float32) * spatial_scale), -1, 0)
    row_level, rows, no_rows = _ranges(y1, y2, length=h, output_size=output_size)
    column_level, columns, no_columns = _ranges(x1, x2, length=w, output_size=output_size)

    tables = _tabulate(_tabulate(features, axis=0), axis=2)
    pooled = None
    for row in rows:
        for column in columns:
            corner = tables.at[
                column_level[:, None, :], row_level[:, :, None], row[:, :, None], column[:, None, :]
            ].get(mode="promise_in_bounds")
            pooled = corner if pooled is None else jnp.maximum(pooled, corner)
    is_empty = no_rows[:, :, None] | no_columns[:, None, :]
    return jnp.where(is_empty[..., None], jnp.zeros((), features.dtype), pooled)


def _round(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Rounds to the nearest whole number, halves away from zero as in C; NumPy rounds halves to even."""
    whole = jnp.trunc(x)
    return (whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0.0)).astype(jnp.int32)


def _ranges(first: Int[Array, " r"], last: Int[Array, " r"], *, length: int, output_size: int):
    """Returns the two look-ups that cover each bin along an axis.

    Returns:
        Number of the table, first cells of the two ranges, and True for empty bins (which look up any cell of
        the map); each `[r, s]`.
    """
    cells = jnp.maximum(last - first + 1, 1)[:, None]
    bins = jnp.arange(output_size, dtype=jnp.int32)[None, :]
    start = jnp.clip(first[:, None] + bins * cells // output_size, 0, length)
    end = jnp.clip(first[:, None] - (-(bins + 1) * cells // output_size), 0, length)
    level = 31 - jax.lax.clz(jnp.maximum(end - start, 1))
    lookups = tuple(jnp.clip(cell, 0, length - 1) for cell in (start, end - (1 << level)))
    return level, lookups, end <= start


def _tabulate(x: Float[Array, "*n"], *, axis: int) -> Float[Array, " levels *n"]:
    """Returns tables whose entry `[k, ..., i, ...]` is the maximum over cells `i` to `i + 2 ** k - 1` of an axis.

    A range beyond the end of the axis wraps around; no look-up uses it.
    """
    tables = [x]
    while 2 ** len(tables) <= x.shape[axis]:
        half = 2 ** (len(tables) - 1)
        tables.append(jnp.maximum(tables[-1], jnp.roll(tables[-1], -half, axis)))
    return jnp.stack(tables)
