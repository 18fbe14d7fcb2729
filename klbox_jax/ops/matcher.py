"""Matches anchors or proposals to ground-truth boxes."""

import enum

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.ops.boxes import area, pairwise_intersection, pairwise_iou
from klbox_jax.structures import AnyArray, GroundTruth

# A box with this share of its area inside a crowd region is ignored: it is neither right nor wrong.
_CROWD_OVERLAP = 0.5


class Label(enum.IntEnum):
    """Training label of a box."""

    IGNORE = -1
    NEGATIVE = 0
    POSITIVE = 1


@flax.struct.dataclass
class MatchResult:
    """Matches of a set of boxes.

    Attributes:
        gt_index: slot of the ground truth with the largest IoU, the first one of equal IoUs; 0 if nothing
            overlaps, so read it together with `labels` or `iou`.
        labels: values of `Label`.
        iou: largest IoU with a ground truth that may be matched, 0 if there is none.
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

    A box is POSITIVE if its IoU is at least the upper threshold, NEGATIVE if it is below the lower one, and
    IGNORE between them. Padded ground truth is not used. A crowd region is never matched; a box that is not
    POSITIVE and has at least half of its area inside one becomes IGNORE. Without ground truth every box is
    NEGATIVE.

    Args:
        boxes: anchors or proposals, in pixels of the canvas.
        gt: ground truth of the same canvas.
        thresholds: lower and upper IoU; with equal ones no box is between them.
        allow_low_quality_matches: for each ground truth, the boxes with the largest IoU (all of them if tied,
            and only if they overlap it) become POSITIVE too. They keep their own `gt_index`.

    Returns:
        `MatchResult` of n rows.
    """
    low, high = thresholds
    num_gt = gt.boxes.shape[0]
    if num_gt == 0 or boxes.shape[0] == 0:
        zeros = jnp.zeros(boxes.shape[0], jnp.int32)
        return MatchResult(gt_index=zeros, labels=zeros + Label.NEGATIVE, iou=zeros.astype(jnp.float32))
    may_match = gt.valid & ~gt.is_crowd
    iou = jnp.where(may_match[:, None], pairwise_iou(gt.boxes, boxes), 0.0)
    # IoUs are compared with their maxima for equality below. If XLA computed them twice, in two fused loops, an IoU
    # could differ in its last bit; the barrier makes them one array.
    iou = jax.lax.optimization_barrier(iou)
    best_iou = jnp.max(iou, axis=0)
    # The first slot with the maximum; XLA's argmax is several times slower on CPU.
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
