"""Which ground-truth box each anchor or proposal stands for."""

import enum

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.ops.boxes import area, pairwise_intersection, pairwise_iou
from klbox_jax.structures import AnyArray, GroundTruth

# A box that lies in a crowd region by this share of its own area is neither right nor wrong.
_CROWD_OVERLAP = 0.5


class Label(enum.IntEnum):
    """What a box is trained as."""

    IGNORE = -1
    NEGATIVE = 0
    POSITIVE = 1


@flax.struct.dataclass
class MatchResult:
    """The answer for each box.

    Attributes:
        gt_index: slot of the ground truth of the largest IoU, the first of equals; 0 where nothing overlaps,
            so meaningful only beside `labels` or `iou`.
        labels: values of `Label`.
        iou: the largest IoU with a ground truth that may be matched, 0 where there is none.
    """

    gt_index: Int[AnyArray, "*b n"]
    labels: Int[AnyArray, "*b n"]
    iou: Float[AnyArray, "*b n"]


def match_boxes(
    boxes: Float[Array, "n 4"],
    gt: GroundTruth,
    *,
    thresholds: tuple[float, float],
    allow_low_quality_matches: bool,
) -> MatchResult:
    """Labels each box by its IoU with the ground truth of one image (detectron2's `Matcher`).

    A box is POSITIVE from the upper threshold on, NEGATIVE below the lower one, IGNORE between them. Padded
    ground truth counts for nothing. A crowd region is never matched; a box that is not POSITIVE and has at
    least half of its area inside one becomes IGNORE. Without any ground truth every box is NEGATIVE.

    Args:
        boxes: anchors or proposals, in pixels of the canvas.
        gt: ground truth of the same canvas, with at least one slot.
        thresholds: lower and upper IoU; equal ones leave nothing between.
        allow_low_quality_matches: for each ground truth, the boxes of the largest IoU with it (all of them
            when tied, and only if they overlap it) become POSITIVE too. They keep their own `gt_index`.

    Returns:
        `MatchResult` of n rows.
    """
    low, high = thresholds
    num_gt = gt.boxes.shape[0]
    may_match = gt.valid & ~gt.is_crowd
    iou = jnp.where(may_match[:, None], pairwise_iou(gt.boxes, boxes), 0.0)
    # Equality is tested against maxima below. Computed twice, inside two fused loops, an IoU could differ in
    # its last bit; the barrier makes it one array.
    iou = jax.lax.optimization_barrier(iou)
    best_iou = jnp.max(iou, axis=0)
    # The first slot that holds the maximum: XLA's argmax is several times slower on CPU.
    slot = jnp.arange(num_gt, dtype=jnp.int32)
    gt_index = jnp.min(jnp.where(iou == best_iou[None, :], slot[:, None], num_gt - 1), axis=0)

    positive = best_iou >= high
    if allow_low_quality_matches:
        best_of_gt = jnp.max(iou, axis=1)
        is_best = (iou == best_of_gt[:, None]) & (best_of_gt > 0)[:, None]
        positive |= jnp.any(is_best, axis=0)

    crowd = (gt.valid & gt.is_crowd)[:, None]
    in_crowd = jnp.max(jnp.where(crowd, pairwise_intersection(gt.boxes, boxes), 0.0), axis=0)
    ignore = (best_iou >= low) | ((in_crowd > 0) & (in_crowd >= _CROWD_OVERLAP * area(boxes)))
    labels = jnp.where(positive, Label.POSITIVE, jnp.where(ignore, Label.IGNORE, Label.NEGATIVE))
    return MatchResult(gt_index=gt_index, labels=labels.astype(jnp.int32), iou=best_iou)
