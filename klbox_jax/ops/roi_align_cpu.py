"""RoIAlign for CPUs: gathers the few cells that each RoI reads.

The interpolation matrices of `roi_pooling` are mostly zeros, and a CPU has no matrix unit. Here a bin is a sum over its
taps: the cells next to its samples, with their weights. XLA's CPU backend compiles that to a single vectorized loop
without intermediate arrays. The transpose would be a scatter, which it runs one cell at a time. Instead, each RoI adds
a product of dense weights and its cotangent, in small windows over the cells that it reads. A RoI without weight in a
map costs almost nothing.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Side of a window in cells: the weights of a window, [64, bins], then fit into the fastest cache.
WINDOW = 8


def sample_positions(
    starts: Float[Array, " r"], ends: Float[Array, " r"], *, samples: int
) -> Float[Array, "r samples"]:
    """Returns the centres of `samples` equal parts of each interval."""
    fractions = (jnp.arange(samples, dtype=jnp.float32) + 0.5) / samples
    return starts[:, None] + (ends - starts)[:, None] * fractions[None, :]


def axis_taps(
    starts: Float[Array, " r"],
    ends: Float[Array, " r"],
    *,
    length: int,
    output_size: int,
    sampling_ratio: int,
) -> tuple[Int[Array, "r s t"], Float[Array, "r s t"]]:
    """Returns the cells along an axis that each bin reads, two for each sample, and their weights.

    The weights of a cell sum to its entry of `interpolation_matrix`; a cell may occur more than once.
    """
    positions = sample_positions(starts, ends, samples=output_size * sampling_ratio)
    inside = (positions >= -1.0) & (positions <= length)
    positions = jnp.where(inside, jnp.clip(positions, min=0.0, max=length - 1.0), 0.0)
    first = jnp.floor(positions).astype(jnp.int32)
    upper = positions - first
    cells = jnp.stack([first, jnp.minimum(first + 1, length - 1)], axis=-1)
    weights = jnp.stack([1.0 - upper, upper], axis=-1) * inside[:, :, None] / sampling_ratio
    shape = (-1, output_size, 2 * sampling_ratio)
    return cells.reshape(shape), weights.reshape(shape)


def gather_taps(
    maps: Sequence[Float[Array, "_h _w c"]],
    regions: Sequence[Float[Array, "r 4"]],
    levels: Int[Array, " r"],
    *,
    output_size: int,
    sampling_ratio: int,
) -> Float[Array, "r s s c"]:
    """Returns RoIAlign of each RoI from the map of its level, summed in float32, in the dtype of the maps.

    `regions` has the RoIs in cells of each map. The cells of all maps are concatenated, so the cost of a RoI does not
    depend on the number of levels.
    """
    sizes = {"output_size": output_size, "sampling_ratio": sampling_ratio}
    begin, chosen = 0, None
    for level, (features, level_regions) in enumerate(zip(maps, regions, strict=True)):
        h, w, _ = features.shape
        x1, y1, x2, y2 = jnp.moveaxis(level_regions, -1, 0)
        rows, row_weights = axis_taps(y1, y2, length=h, **sizes)
        columns, column_weights = axis_taps(x1, x2, length=w, **sizes)
        taps = begin + rows * w, columns, row_weights, column_weights
        here = (levels == level)[:, None, None]
        chosen = (
            taps if chosen is None else [jnp.where(here, *pair) for pair in zip(taps, chosen, strict=True)]
        )
        begin += h * w
    rows, columns, row_weights, column_weights = chosen

    cells = jnp.concatenate([features.reshape(-1, features.shape[2]) for features in maps])
    total = jnp.zeros((), jnp.promote_types(cells.dtype, jnp.float32))
    for row in range(2 * sampling_ratio):
        for column in range(2 * sampling_ratio):
            places = rows[:, :, None, row] + columns[:, None, :, column]
            tap_weights = row_weights[:, :, None, row] * column_weights[:, None, :, column]
            tap = cells.at[places].get(mode="promise_in_bounds").astype(total.dtype)
            total = total + tap * tap_weights[..., None]
    return total.astype(cells.dtype)


def spread_windows(
    cotangent: Float[Array, "r s s c"], rows: Float[Array, "r s h"], columns: Float[Array, "r s w"]
) -> Float[Array, "h w c"]:
    """Returns the sum over RoIs of `rows^T @ cotangent @ columns`, in the dtype of the cotangent.

    Processes one RoI after the other, in windows from the first to the last row and column with a weight that is not
    zero. Under `vmap` it is still a single loop, over the RoIs of all images; if the images are split over several
    CPU devices, each device runs through all of them.
    """
    return _spread_images(cotangent[None], rows[None], columns[None])[0]


@jax.custom_batching.custom_vmap
def _spread_images(cotangent, rows, columns):
    """Computes `spread_windows` of a batch, with the maps of the images stacked along the rows."""
    images, per_image, bins, _, c = cotangent.shape
    h, w = rows.shape[-1], columns.shape[-1]
    height, width = min(WINDOW, h), min(WINDOW, w)
    dtype = jnp.promote_types(cotangent.dtype, jnp.float32)

    count = images * per_image
    cotangent = cotangent.reshape(count, bins * bins, c)
    rows, columns = rows.reshape(count, bins, h), columns.reshape(count, bins, w)
    first_row, down = _windows(rows, height)
    first_column, across = _windows(columns, width)

    def add_roi(roi, gradient):
        arriving, above = _at(cotangent, roi).astype(dtype), roi // per_image * h

        def add_window(window, gradient):
            row, column = jax.lax.div(window, _at(across, roi)), jax.lax.rem(window, _at(across, roi))
            row_weights, top = _cut(rows, roi, _at(first_row, roi) + row * height, height)
            column_weights, left = _cut(columns, roi, _at(first_column, roi) + column * width, width)
            weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
            added = weights.reshape(bins * bins, height * width).T.astype(dtype) @ arriving
            present = _slice(gradient, (above + top, left, 0), (height, width, c))
            return jax.lax.dynamic_update_slice(
                gradient,
                present + added.reshape(height, width, c),
                (above + top, left, 0),
                allow_negative_indices=False,
            )

        return jax.lax.fori_loop(0, _at(down, roi) * _at(across, roi), add_window, gradient)

    gradient = jax.lax.fori_loop(0, count, add_roi, jnp.zeros((images * h, w, c), dtype))
    return gradient.reshape(images, h, w, c).astype(cotangent.dtype)


@_spread_images.def_vmap
def _spread_batch(size, batched, *arguments):
    def merge(argument, is_batched):
        argument = argument if is_batched else jnp.broadcast_to(argument[None], (size, *argument.shape))
        return argument.reshape(-1, *argument.shape[2:])

    gradient = _spread_images(*map(merge, arguments, batched))
    return gradient.reshape(size, -1, *gradient.shape[1:]), True


def _windows(matrices, size):
    """Returns the first cell that a bin of a RoI uses, and the number of windows from there to the last such cell."""
    cells = jnp.arange(matrices.shape[2], dtype=jnp.int32)[None, None, :]
    first = jnp.where(matrices != 0, cells, matrices.shape[2]).min(axis=(1, 2))
    after_last = jnp.where(matrices != 0, cells + 1, 0).max(axis=(1, 2))
    return first, (jnp.maximum(after_last - first, 0) + size - 1) // size


def _cut(matrices, roi, start, size):
    """Returns the weights of a window of `size` cells that begins at `start`, and its first cell."""
    # At the end of the map the window begins earlier; the cells before `start` are in the window before it.
    first = jnp.minimum(start, matrices.shape[2] - size)
    weights = _slice(matrices, (roi, 0, first), (1, matrices.shape[1], size))[0]
    return jnp.where((first + jnp.arange(size) >= start)[None, :], weights, 0.0), first


_slice = functools.partial(jax.lax.dynamic_slice, allow_negative_indices=False)
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
