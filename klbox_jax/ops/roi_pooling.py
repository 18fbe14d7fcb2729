"""RoIAlign as two interpolation matrices and two products.

The bilinear weight of a sample for a cell is separable: tent(y - row) * tent(x - column). So a RoI of s x s
bins is `rows @ features @ columns^T`, with one s x H and one s x W matrix for each RoI. Products run at the speed
of the machine's matrix unit, and their gradient with respect to the features is a product too, not a scatter.

This is the form for accelerators. A CPU has no matrix unit, and RoIAlign's matrices are nearly all zeros: on CPUs
the lowering chooses the form of `roi_align_cpu`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.ops.roi_align_cpu import gather_taps, sample_positions, spread_windows

# Largest number of values of `rows @ features` that memory holds at once for one image: 64 MiB in float32.
MOST_BANDED = 2**24

# Largest `sampling_ratio` for the gathering form on CPUs: its program has 4 * sampling_ratio ** 2 gathers.
MOST_TAPPED = 4

# Largest number of values of a map for the product form on CPUs. For such a small map the gradient takes no longer than
# the loop over windows, the forward pass a millisecond more than gathering, and the program compiles faster.
SMALL_MAP = 2**15


def interpolation_matrix(
    starts: Float[Array, " r"],
    ends: Float[Array, " r"],
    *,
    length: int,
    output_size: int,
    sampling_ratio: int,
) -> Float[Array, "r s length"]:
    """Returns the weight of each cell along an axis in each bin of each interval `[start, end]`.

    Intervals are in cells of the feature map, and cell `i` has its centre at `i`. Each bin is the mean of
    `sampling_ratio` samples. A sample up to one cell outside the map has the value at the border, a sample farther
    outside is zero, as in detectron2 and torchvision.
    """
    positions = sample_positions(starts, ends, samples=output_size * sampling_ratio)
    inside = (positions >= -1.0) & (positions <= length)
    positions = jnp.clip(positions, min=0.0, max=length - 1.0)
    cells = jnp.arange(length, dtype=jnp.float32)
    tent = jnp.maximum(0.0, 1.0 - jnp.abs(positions[:, :, None] - cells[None, None, :]))
    tent = jnp.where(inside[:, :, None], tent, 0.0)
    return tent.reshape(-1, output_size, sampling_ratio, length).mean(axis=2)


def roi_align(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    output_size: int,
    sampling_ratio: int,
    spatial_scale: float,
    aligned: bool = True,
) -> Float[Array, "r s s c"]:
    """Pools each box into a grid of `output_size` x `output_size` bins (He et al., Mask R-CNN, section 3).

    Agrees with `torchvision.ops.roi_align` for a fixed `sampling_ratio`. Differentiable in the features and
    in the boxes, in reverse mode only.

    Args:
        features: one image's feature map.
        boxes: RoIs in pixels of the canvas.
        output_size: number of bins along each side.
        sampling_ratio: number of samples along each side of a bin.
        spatial_scale: feature cells per pixel, 1 / stride.
        aligned: shift by half a cell, so that pixel `i` covers `[i, i + 1)`. If False, there is no shift, and RoIs
            are at least one cell wide, as in older implementations.
    """
    regions = _regions(boxes, spatial_scale=spatial_scale, aligned=aligned)
    map_index = jnp.zeros(boxes.shape[:1], jnp.int32)
    return _align((features,), (regions,), map_index, output_size, sampling_ratio)


def multilevel_roi_align(
    maps: dict[int, Float[Array, "_h _w c"]],
    boxes: Float[Array, "r 4"],
    map_index: Int[Array, " r"],
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool = True,
) -> Float[Array, "r s s c"]:
    """Computes RoIAlign of each box from one of the maps of a pyramid.

    Args:
        maps: one image's feature maps, each under its stride in pixels.
        boxes: RoIs in pixels of the canvas.
        map_index: number of the map of each box, 0 for the smallest stride.
        output_size, sampling_ratio, aligned: see `roi_align`.
    """
    strides, features = zip(*sorted(maps.items()), strict=True)
    regions = tuple(_regions(boxes, spatial_scale=1.0 / stride, aligned=aligned) for stride in strides)
    return _align(features, regions, map_index, output_size, sampling_ratio)


def _regions(boxes, *, spatial_scale, aligned):
    """Returns the boxes in cells of a map, where cell `i` has its centre at `i`."""
    regions = boxes.astype(jnp.float32) * spatial_scale - (0.5 if aligned else 0.0)
    if not aligned:
        starts, ends = regions[:, :2], regions[:, 2:]
        regions = jnp.concatenate([starts, jnp.maximum(ends, starts + 1.0)], axis=1)
    return regions


# The gradient is defined explicitly, so that only the arguments are kept for the backward pass. Otherwise JAX would
# keep the residuals of every platform's branch.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _align(maps, regions, map_index, output_size, sampling_ratio):
    """Returns RoIAlign of each RoI from its map; `regions` has the RoIs in cells of each map."""
    sizes = {"output_size": output_size, "sampling_ratio": sampling_ratio}
    multiplied = functools.partial(_multiply_maps, **sizes)
    is_small = map_index.size == 0 or sum(features.size for features in maps) <= SMALL_MAP
    if sampling_ratio > MOST_TAPPED or is_small:
        return multiplied(maps, regions, map_index)
    return jax.lax.platform_dependent(
        maps, regions, map_index, cpu=functools.partial(gather_taps, **sizes), default=multiplied
    )


def _align_forward(maps, regions, map_index, output_size, sampling_ratio):
    # () or None: a residual must be a pytree, so its structure says if the RoIs need a gradient.
    wanted = () if any(map_regions.perturbed for map_regions in regions) else None
    maps, regions = (tuple(argument.value for argument in arguments) for arguments in (maps, regions))
    kept = maps, regions, map_index.value
    return _align(*kept, output_size, sampling_ratio), (kept, wanted)


def _align_backward(output_size, sampling_ratio, kept, cotangent):
    (maps, regions, map_index), wanted = kept
    sizes = {"output_size": output_size, "sampling_ratio": sampling_ratio}

    def map_gradient(index, features):
        rows, columns = _matrices(features, regions[index], map_index == index, **sizes)

        def transposed(cotangent, rows, columns):
            pool = functools.partial(pool_with_matrices, rows=rows, columns=columns)
            return jax.linear_transpose(pool, features)(cotangent)[0]

        is_small = map_index.size == 0 or features.size <= SMALL_MAP
        cpu = transposed if is_small else spread_windows
        return jax.lax.platform_dependent(cotangent, rows, columns, cpu=cpu, default=transposed)

    gradients = tuple(map_gradient(index, features) for index, features in enumerate(maps))
    if wanted is None:
        return gradients, None, None
    pulled = jax.vjp(lambda regions: _multiply_maps(maps, regions, map_index, **sizes), regions)[1](cotangent)
    return gradients, *pulled, None


_align.defvjp(_align_forward, _align_backward, symbolic_zeros=True)


def _multiply_maps(maps, regions, map_index, **sizes):
    """Returns RoIAlign in the form for accelerators: every map pools every RoI, those of other maps as zeros."""
    return sum(
        pool_with_matrices(features, *_matrices(features, map_regions, map_index == index, **sizes))
        for index, (features, map_regions) in enumerate(zip(maps, regions, strict=True))
    )


def _matrices(features, regions, chosen, **sizes):
    x1, y1, x2, y2 = jnp.moveaxis(regions, -1, 0)
    rows = interpolation_matrix(y1, y2, length=features.shape[0], **sizes)
    columns = interpolation_matrix(x1, x2, length=features.shape[1], **sizes)
    return rows * chosen[:, None, None], columns


def pool_with_matrices(
    features: Float[Array, "h w c"], rows: Float[Array, "r s h"], columns: Float[Array, "r s w"]
) -> Float[Array, "r s s c"]:
    """Returns the product `rows @ features @ columns^T` of each RoI, in the dtype of the features.

    `rows @ features` is as wide as the map: gigabytes for a thousand RoIs on the map of a photograph. If it has more
    than `MOST_BANDED` values, the RoIs are processed in groups, one after the other, and the backward pass computes
    it again.
    """
    rows, columns = rows.astype(features.dtype), columns.astype(features.dtype)
    count, output_size, _ = rows.shape
    _, w, c = features.shape
    groups = -(-count // max(1, MOST_BANDED // (output_size * w * c)))
    if groups <= 1:
        return _pool_at_once(features, rows, columns)
    size = -(-count // groups)

    def grouped(matrices):
        # Zeros fill the last group.
        padded = jnp.pad(matrices, ((0, groups * size - count), (0, 0), (0, 0)))
        return padded.reshape(groups, size, *matrices.shape[1:])

    pool = jax.checkpoint(_pool_at_once, prevent_cse=False)
    pooled = jax.lax.map(lambda group: pool(features, *group), (grouped(rows), grouped(columns)))
    return pooled.reshape(groups * size, output_size, output_size, c)[:count]


def _pool_at_once(features, rows, columns):
    h, w, c = features.shape
    output_size = rows.shape[1]
    # [r s, h] x [h, w c]: one large product for all RoIs.
    banded = (rows.reshape(-1, h) @ features.reshape(h, w * c)).reshape(-1, output_size, w, c)
    # Repeating the small matrix for each row of bins avoids a transposition of the large array.
    columns = jnp.broadcast_to(columns[:, None], (*rows.shape[:2], output_size, w))
    return jnp.einsum("rpqw,rpwc->rpqc", columns, banded)
