"""RoIAlign as two interpolation matrices and two products.

The bilinear weight of a sample for a cell is separable: tent(y - row) * tent(x - column). A RoI of s x s
bins is therefore `rows @ features @ columns^T`, with one s x H and one s x W matrix for each RoI. Products
run at the speed of the machine's matrix unit, and their gradient with respect to the features is a product
again instead of a scatter.

That is the form for accelerators. A CPU has no such unit, and RoIAlign's matrices are nearly all zeros: there the
lowering takes the form of `roi_taps`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.ops.roi_align_cpu import gather_taps, sample_positions, spread_windows

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
    """
    regions = _regions(boxes, spatial_scale=spatial_scale, aligned=aligned)
    levels = jnp.zeros(boxes.shape[:1], jnp.int32)
    return _align((features,), (regions,), levels, output_size, sampling_ratio)


def _regions(boxes, *, spatial_scale, aligned):
    """Boxes in cells of a map, cell `i` having its centre at `i`."""
    regions = boxes.astype(jnp.float32) * spatial_scale - (0.5 if aligned else 0.0)
    if not aligned:
        starts, ends = regions[:, :2], regions[:, 2:]
        regions = jnp.concatenate([starts, jnp.maximum(ends, starts + 1.0)], axis=1)
    return regions


# The rule for gradients is written out, so that only the arguments are kept for the backward pass, and not the union
# of what every platform's branch would keep.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _align(maps, regions, levels, output_size, sampling_ratio):
    """RoIAlign of each RoI from the map of its level; `regions` has the RoIs in the cells of each map."""
    sizes = {"output_size": output_size, "sampling_ratio": sampling_ratio}
    multiplied = functools.partial(_multiply_levels, **sizes)
    if sampling_ratio > MOST_TAPPED or sum(features.size for features in maps) <= SMALL_MAP:
        return multiplied(maps, regions, levels)
    return jax.lax.platform_dependent(
        maps, regions, levels, cpu=functools.partial(gather_taps, **sizes), default=multiplied
    )


def _align_forward(maps, regions, levels, output_size, sampling_ratio):
    # Whether a gradient of the RoIs is asked for at all, told by the structure.
    wanted = () if any(level_regions.perturbed for level_regions in regions) else None
    maps, regions = (tuple(argument.value for argument in arguments) for arguments in (maps, regions))
    kept = maps, regions, levels.value
    return _align(*kept, output_size, sampling_ratio), (kept, wanted)


def _align_backward(output_size, sampling_ratio, kept, cotangent):
    (maps, regions, levels), wanted = kept
    sizes = {"output_size": output_size, "sampling_ratio": sampling_ratio}

    def map_gradient(level, features):
        rows, columns = _matrices(features, regions[level], levels == level, **sizes)

        def transposed(cotangent, rows, columns):
            pool = functools.partial(pool_with_matrices, rows=rows, columns=columns)
            return jax.linear_transpose(pool, features)(cotangent)[0]

        cpu = transposed if features.size <= SMALL_MAP else spread_windows
        return jax.lax.platform_dependent(cotangent, rows, columns, cpu=cpu, default=transposed)

    gradients = tuple(map_gradient(level, features) for level, features in enumerate(maps))
    if wanted is None:
        return gradients, None, None
    pulled = jax.vjp(lambda regions: _multiply_levels(maps, regions, levels, **sizes), regions)[1](cotangent)
    return gradients, *pulled, None


_align.defvjp(_align_forward, _align_backward, symbolic_zeros=True)


def _multiply_levels(maps, regions, levels, **sizes):
    """The form for accelerators: every level pools every RoI, and those of another level are zeros."""
    return sum(
        pool_with_matrices(features, *_matrices(features, level_regions, levels == level, **sizes))
        for level, (features, level_regions) in enumerate(zip(maps, regions, strict=True))
    )


def _matrices(features, regions, chosen, **sizes):
    x1, y1, x2, y2 = jnp.moveaxis(regions, -1, 0)
    rows = interpolation_matrix(y1, y2, length=features.shape[0], **sizes)
    columns = interpolation_matrix(x1, x2, length=features.shape[1], **sizes)
    return rows * chosen[:, None, None], columns


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


def trim_boxes(boxes: Float[Array, "r 4"], trim: float) -> Float[Array, "r 4"]:
    """Moves the right and the lower edges in by `trim` pixels."""
    return boxes - jnp.array([[0.0, 0.0, trim, trim]]) if trim else boxes


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
    """RoIAlign of each box from the pyramid level that fits its size.

    Args:
        features: one image's maps, finest first.
        boxes: RoIs in pixels of the canvas.
        strides: pixels per cell of each map.
        output_size, sampling_ratio, aligned: as in `roi_align`.
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
    regions = tuple(
        _regions(trim_boxes(boxes, trim), spatial_scale=1.0 / stride, aligned=aligned)
        for _, stride in zip(features, strides, strict=True)
    )
    return _align(tuple(features), regions, levels, output_size, sampling_ratio)
