"""Mask targets: crops the masks of annotated objects to RoIs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def crop_and_resize_masks(
    masks: UInt8[Array, "g m m"],
    mask_boxes: Float[Array, "g 4"],
    boxes: Float[Array, "r 4"],
    gt_index: Int[Array, " r"],
    *,
    output_size: int,
) -> Float[Array, "r s s"]:
    """Returns 1 for each bin of a RoI that its object covers and 0 for the others (He et al. 2017, section 3.1).

    The mask is read at the centre of each bin, by bilinear interpolation between the centres of its cells; the
    bin is 1 if the value is 0.5 or more. Outside the object's box the mask is 0. detectron2's
    `BitMasks.crop_and_resize` averages the mask of the whole image over each bin before the threshold, so
    targets differ in bins on the outline of the object.

    Args:
        masks: masks of all objects of an image, 0 or 1; each fills its box.
        mask_boxes: boxes of the masks, in pixels of the canvas; a box without area covers nothing.
        boxes: RoIs in pixels of the canvas.
        gt_index: row of `masks` of each RoI's object.
        output_size: number of bins along each side.
    """
    x1, y1, x2, y2 = jnp.moveaxis(boxes.astype(jnp.float32), -1, 0)
    mask_x1, mask_y1, mask_x2, mask_y2 = jnp.moveaxis(mask_boxes[gt_index].astype(jnp.float32), -1, 0)
    cells, bins = masks.shape[-1], output_size
    rows = _sampling_matrix(y1, y2, mask_y1, mask_y2, cells=cells, bins=bins)
    columns = _sampling_matrix(x1, x2, mask_x1, mask_x2, cells=cells, bins=bins)
    covered = jnp.einsum("rpm,rmn,rqn->rpq", rows, masks[gt_index].astype(jnp.float32), columns)
    return (covered >= 0.5).astype(jnp.float32)


def _sampling_matrix(
    start: Float[Array, " r"],
    end: Float[Array, " r"],
    mask_start: Float[Array, " r"],
    mask_end: Float[Array, " r"],
    *,
    cells: int,
    bins: int,
) -> Float[Array, "r s m"]:
    """Returns the weight of each cell of a mask's axis at the centre of each bin of a RoI's axis."""
    centres = (jnp.arange(bins, dtype=jnp.float32) + 0.5) / bins
    positions = start[:, None] + (end - start)[:, None] * centres[None, :]
    length = mask_end - mask_start
    has_length = length > 0
    shares = (positions - mask_start[:, None]) / jnp.where(has_length, length, 1.0)[:, None]
    inside = (shares >= 0.0) & (shares <= 1.0) & has_length[:, None]
    # Between the outermost cell centres and the edge of the box the mask keeps its value.
    positions = jnp.clip(shares * cells - 0.5, 0.0, cells - 1.0)
    distance = positions[:, :, None] - jnp.arange(cells, dtype=jnp.float32)[None, None, :]
    return jnp.where(inside[:, :, None], jnp.maximum(0.0, 1.0 - jnp.abs(distance)), 0.0)
