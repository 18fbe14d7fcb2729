"""RoIAlign as two interpolation matrices and two products.

The bilinear weight of a sample for a cell is separable: tent(y - row) * tent(x - column). A RoI of s x s
bins is therefore `rows @ features @ columns^T`, with one s x H and one s x W matrix for each RoI. Products
run at the speed of the machine's matrix unit, and their gradient with respect to the features is a product
again instead of a scatter.

That is the form for accelerators. A CPU has no such unit, and RoIAlign's matrices are nearly all zeros: there the
lowering takes the form of `roi_taps`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.ops.roi_taps import gather_taps, sample_positions, spread_windows

# Numbers of the product with the rows that are held at once, of one image: 64 MiB in float32.
MOST_BANDED = 2**24

# Samples along a bin's side up to which a CPU gathers them: the program has four gathers for each of their squares.
MOST_TAPPED = 4

# Numbers of a map up to which CPUs multiply by the matrices as well: over so small a map a product takes no longer than
# a loop over the windows of each RoI, or a millisecond more than gathering, and compiles faster.
SMALL_MAP = 2**15


def interpolation_matrix(
    starts: Float[Array, " r"],
    ends: Float[Array, " r"],
    *,
    length: int,
    output_size: int,
    sampling_ratio: int,
) -> Float[Array, "r s length"]:
    """Returns the weight of each cell of an axis in each bin of each interval `[start, end]`.

    Intervals are in cells of the feature map, cell `i` having its centre at `i`. Each bin is the mean of
    `sampling_ratio` samples. A sample up to one cell outside the map takes the value at the border, one
    further out is zero, as in detectron2 and torchvision.
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
    weights: Float[Array, " r"] | None = None,
) -> Float[Array, "r s s c"]:
    """Pools each box into a grid of `output_size` x `output_size` bins (He et al., Mask R-CNN, section 3).

    Agrees with `torchvision.ops.roi_align` for a fixed `sampling_ratio`. Differentiable in the features and
    in the boxes, in reverse mode only.

    Args:
        features: one image's feature map.
        boxes: RoIs in pixels of the canvas.
        output_size: bins along each side.
        sampling_ratio: samples along each side of a bin.
        spatial_scale: feature cells per pixel, 1 / stride.
        aligned: shift by half a cell, so that pixel `i` covers `[i, i + 1)`. Without it, RoIs
            are at least one cell wide, as in the older implementations.
        weights: factor for each RoI; 0 leaves a RoI out (see `pool_from_levels`).
    """
    regions = boxes.astype(jnp.float32) * spatial_scale - (0.5 if aligned else 0.0)
    if not aligned:
        starts, ends = regions[:, :2], regions[:, 2:]
        regions = jnp.concatenate([starts, jnp.maximum(ends, starts + 1.0)], axis=1)
    if weights is None:
        weights = jnp.ones(boxes.shape[:1], jnp.float32)
    return _align(features, regions, weights, output_size, sampling_ratio)


# The rule for gradients is written out, so that only the arguments are kept for the backward pass, and not the union
# of what every platform's branch would keep.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _align(features, regions, weights, output_size, sampling_ratio):
    """RoIAlign of regions in cells."""
    sizes = {"output_size": output_size, "sampling_ratio": sampling_ratio}

    def multiplied(features, regions, weights):
        return pool_with_matrices(features, *_matrices(features, regions, weights, **sizes))

    if sampling_ratio > MOST_TAPPED or features.size <= SMALL_MAP:
        return multiplied(features, regions, weights)
    return jax.lax.platform_dependent(
        features, regions, weights, cpu=functools.partial(gather_taps, **sizes), default=multiplied
    )


def _align_forward(features, regions, weights, output_size, sampling_ratio):
    primals = features.value, regions.value, weights.value
    # Whether a gradient of the RoIs is asked for at all, told by the structure.
    wanted = () if regions.perturbed or weights.perturbed else None
    return _align(*primals, output_size, sampling_ratio), (primals, wanted)


def _align_backward(output_size, sampling_ratio, kept, cotangent):
    (features, regions, weights), wanted = kept
    sizes = {"output_size": output_size, "sampling_ratio": sampling_ratio}
    rows, columns = _matrices(features, regions, weights, **sizes)

    def transposed(cotangent, rows, columns):
        pool = functools.partial(pool_with_matrices, rows=rows, columns=columns)
        return jax.linear_transpose(pool, features)(cotangent)[0]

    small = features.size <= SMALL_MAP
    features_gradient = jax.lax.platform_dependent(
        cotangent, rows, columns, cpu=transposed if small else spread_windows, default=transposed
    )
    if wanted is None:
        return features_gradient, None, None

    def pool(regions, weights):
        return pool_with_matrices(features, *_matrices(features, regions, weights, **sizes))

    return features_gradient, *jax.vjp(pool, regions, weights)[1](cotangent)


_align.defvjp(_align_forward, _align_backward, symbolic_zeros=True)


def _matrices(features, regions, weights, **sizes):
    x1, y1, x2, y2 = jnp.moveaxis(regions, -1, 0)
    rows = interpolation_matrix(y1, y2, length=features.shape[0], **sizes)
    columns = interpolation_matrix(x1, x2, length=features.shape[1], **sizes)
    return rows * weights[:, None, None], columns


def pool_with_matrices(
    features: Float[Array, "h w c"], rows: Float[Array, "r s h"], columns: Float[Array, "r s w"]
) -> Float[Array, "r s s c"]:
    """The product `rows @ features @ columns^T` of each RoI, in the dtype of the features.

    The product with the rows is as wide as the map, gigabytes for a thousand RoIs on the map of a photograph.
    Where it has more than `MOST_BANDED` numbers, the RoIs go through in groups, one after the other, and what a
    gradient needs of it is computed again.
    """
    rows, columns = rows.astype(features.dtype), columns.astype(features.dtype)
    count, output_size, _ = rows.shape
    _, w, c = features.shape
    groups = -(-count // max(1, MOST_BANDED // (output_size * w * c)))
    if groups <= 1:
        return _pool_at_once(features, rows, columns)
    size = -(-count // groups)

    def grouped(matrices):
        # RoIs of zeros fill the last group.
        padded = jnp.pad(matrices, ((0, groups * size - count), (0, 0), (0, 0)))
        return padded.reshape(groups, size, *matrices.shape[1:])

    pool = jax.checkpoint(_pool_at_once, prevent_cse=False)
    pooled = jax.lax.map(lambda group: pool(features, *group), (grouped(rows), grouped(columns)))
    return pooled.reshape(groups * size, output_size, output_size, c)[:count]


def _pool_at_once(features, rows, columns):
    h, w, c = features.shape
    output_size = rows.shape[1]
    # [r s, h] x [h, w c]: a single large product for all RoIs.
    banded = (rows.reshape(-1, h) @ features.reshape(h, w * c)).reshape(-1, output_size, w, c)
    # Repeating the small matrix for each row of bins spares a transposition of the large array.
    columns = jnp.broadcast_to(columns[:, None], (*rows.shape[:2], output_size, w))
    return jnp.einsum("rpqw,rpwc->rpqc", columns, banded)


def assign_boxes_to_levels(
    boxes: Float[Array, "r 4"],
    *,
    min_level: int,
    max_level: int,
    canonical_box_size: float = 224.0,
    canonical_level: int = 4,
) -> Int[Array, " r"]:
    """Returns the pyramid level of each box, counted from `min_level` (Lin et al., FPN, equation 1)."""
    sizes = jnp.sqrt(
        jnp.maximum(boxes[:, 2] - boxes[:, 0], 0.0) * jnp.maximum(boxes[:, 3] - boxes[:, 1], 0.0)
    )
    # The small constants keep log2 finite and a box of exactly the canonical size on its level.
    levels = jnp.floor(canonical_level + jnp.log2(sizes / canonical_box_size + 1e-8) + 1e-6)
    return jnp.clip(levels, min=min_level, max=max_level).astype(jnp.int32) - min_level


def multilevel_roi_align(
    features: Sequence[Float[Array, "_h _w c"]],
    boxes: Float[Array, "r 4"],
    *,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    min_level: int,
    canonical_box_size: float = 224.0,
    canonical_level: int = 4,
    aligned: bool = True,
    trim: float = 0.0,
) -> Float[Array, "r s s c"]:
    """RoIAlign of each box from the pyramid level that fits its size; see `pool_from_levels`."""
    pool = functools.partial(
        roi_align, output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned
    )
    return pool_from_levels(
        pool,
        features,
        boxes,
        strides=strides,
        min_level=min_level,
        canonical_box_size=canonical_box_size,
        canonical_level=canonical_level,
        trim=trim,
    )


def pool_from_levels(
    pool: Callable[..., Float[Array, "r s s c"]],
    features: Sequence[Float[Array, "_h _w c"]],
    boxes: Float[Array, "r 4"],
    *,
    strides: Sequence[int],
    min_level: int,
    canonical_box_size: float,
    canonical_level: int,
    trim: float = 0.0,
) -> Float[Array, "r s s c"]:
    """Pools each box from the pyramid level that fits its size.

    Every level pools every box and a weight of zero takes out those that belong elsewhere: shapes stay
    fixed, and no feature is gathered.

    Args:
        pool: called as `pool(features, boxes, spatial_scale=..., weights=...)` for each level.
        features: one image's maps, finest first.
        boxes: RoIs in pixels of the canvas.
        strides: pixels per cell of each map.
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
    regions = boxes - jnp.array([[0.0, 0.0, trim, trim]]) if trim else boxes
    return sum(
        pool(
            level_features,
            regions,
            spatial_scale=1.0 / stride,
            weights=(levels == index).astype(jnp.float32),
        )
        for index, (level_features, stride) in enumerate(zip(features, strides, strict=True))
    )
