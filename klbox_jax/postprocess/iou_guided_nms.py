"""IoU-guided NMS (Jiang et al., IoU-Net, ECCV 2018): keeps the box of a cluster that is located best."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.ops.nms import suppress_sorted
from klbox_jax.postprocess.greedy_suppression import SuppressionResult


def iou_guided_nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    predicted_ious: Float[Array, " N"],
    classes: Int[Array, " N"],
    valid: Bool[Array, " N"],
    *,
    iou_threshold: float,
    max_outputs: int,
) -> SuppressionResult:
    """Takes the box of the largest predicted IoU, removes its cluster, inherits its best score, and repeats.

    The paper's Algorithm 1. The cluster of a box is itself and every remaining box of its class whose IoU with
    it is above the threshold; the box kept gets the largest class score of its cluster.

    The boxes are ranked by the predicted IoU and cut by the class score, so the picks cannot end early: the last one
    may have the best score. But they need not be made one by one. The boxes kept are those of hard NMS on the predicted
    IoU, and a removed box belongs to the first kept box that covers it.

    Args:
        boxes: one space, any units.
        scores: class scores.
        predicted_ious: rank the boxes; equal ones rank by row.
        classes: only equal classes act on each other.
        valid: False rows are neither kept nor counted, whatever they hold.
        iou_threshold: an IoU equal to it does not remove (as in `hard_nms`).
        max_outputs: number of slots.

    Returns:
        The kept boxes of the best scores, best first; equal scores go by the predicted IoU. `scores` are those
        of the clusters.
    """
    num_boxes = boxes.shape[0]
    if num_boxes == 0:
        unused = jnp.zeros(max_outputs, jnp.int32)
        return SuppressionResult(
            indices=unused, scores=unused.astype(scores.dtype), valid=unused.astype(bool)
        )
    order = jnp.argsort(jnp.where(valid, predicted_ious, -jnp.inf), descending=True, stable=True)
    boxes, scores, classes, valid = boxes[order], scores[order], classes[order], valid[order]
    keep = suppress_sorted(boxes, valid, iou_threshold=iou_threshold, classes=classes)

    row = jnp.arange(num_boxes)
    covers = (pairwise_iou(boxes, boxes) > iou_threshold) & (classes[:, None] == classes[None, :])
    first = jnp.min(jnp.where(covers & keep[:, None], row[:, None], num_boxes), axis=0)
    # A kept box owns itself even if it is empty and does not overlap itself.
    owner = jnp.where(keep, row, jnp.where(valid, first, num_boxes))
    cluster_scores = jnp.full(num_boxes, -jnp.inf).at[owner].max(scores, mode="drop")

    ranked = jnp.where(keep, cluster_scores, -jnp.inf)
    top_scores, position = jax.lax.top_k(ranked, min(max_outputs, num_boxes))
    found = keep[position]
    unused = (0, max(max_outputs - num_boxes, 0))
    return SuppressionResult(
        indices=jnp.pad(jnp.where(found, order[position], 0), unused),
        scores=jnp.pad(jnp.where(found, top_scores, 0.0), unused),
        valid=jnp.pad(found, unused),
    )
