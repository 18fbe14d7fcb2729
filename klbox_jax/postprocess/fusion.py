"""Fusion: all boxes of a cluster become one. BayesOD fuses around kept boxes, WBF makes its own clusters."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.postprocess.voting import VotingResult, average_voters, overlaps
from klbox_jax.structures import AnyArray


def bayes_fusion(
    kept_boxes: Float[Array, "D 4"],
    kept_classes: Int[Array, " D"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_variances: Float[Array, "N 4"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    affinity: float = 0.7,
    calibration: float = 1.0,
    kept_variances: Float[Array, "D 4"] | None = None,
    variance_mode: str = "fused",
) -> VotingResult:
    """Bayesian fusion of BayesOD (Harakeh et al., ICRA 2020), with diagonal covariances.

    The members of a cluster are the valid candidates of the class whose IoU with its centre, the kept box, is
    above `affinity`. Each is taken for an independent measurement of the same box, under a flat prior:

        1 / var = sum_i 1 / var_i          x = var * sum_i x_i / var_i

    Bayes' rule multiplies densities of one quantity, so the variances must be in the space in which the boxes
    are averaged: squared pixels, both as weights and as the result. `variance_voting` follows its paper
    instead and weighs by coded variances, which are relative to the size of each candidate's own proposal.

    Members share pixels, so `fused` claims too much certainty, by about their number. The authors' code
    (bayes-od-rc) multiplies it by 70, chosen on its data sets, and does not ask members for the centre's
    class; their later code (probdet) does, as here. Full covariances and the prior around the anchor are
    left out.

    Args:
        kept_boxes, kept_classes, candidate_boxes, candidate_classes, candidate_valid: as in `variance_voting`.
        candidate_variances: variance of each edge in squared pixels, positive.
        affinity: IoU above which a candidate belongs to the cluster; probdet also uses 0.9.
        calibration: factor on the variance of `fused`; the other modes need none.
        kept_variances: as in `variance_voting`, in squared pixels.
        variance_mode: as in `variance_voting`; `fused` is the published one.

    Returns:
        As `variance_voting`.

    Raises:
        ValueError: if the affinity is not in [0, 1), the calibration not positive, or as `variance_voting`
            for the variances.
    """
    if not 0 <= affinity < 1:
        raise ValueError(f"Bayesian fusion needs an affinity in [0, 1), got {affinity}.")
    if not calibration > 0:
        raise ValueError(f"Bayesian fusion needs calibration > 0, got {calibration}.")
    iou, peers = overlaps(kept_boxes, kept_classes, candidate_boxes, candidate_classes, candidate_valid)
    result = average_voters(
        kept_boxes,
        (peers & (iou > affinity)).astype(candidate_boxes.dtype),
        candidate_boxes,
        candidate_valid,
        weight_variances=candidate_variances,
        reported_variances=candidate_variances,
        kept_variances=kept_variances,
        variance_mode=variance_mode,
    )
    return result.replace(variances=calibration * result.variances) if variance_mode == "fused" else result


@flax.struct.dataclass
class FusedClusters:
    """The clusters of `weighted_boxes_fusion`, in the order in which they were opened; unused slots hold zeros.

    Attributes:
        boxes: fused boxes.
        scores: mean score of the members; not sorted.
        classes: their class.
        variances: of each edge, or None where no variances were given.
        indices: row of the first member, which has the highest score.
        valid: False for an unused slot.
    """

    boxes: Float[AnyArray, "*b N 4"]
    scores: Float[AnyArray, "*b N"]
    classes: Int[AnyArray, "*b N"]
    variances: Float[AnyArray, "*b N 4"] | None
    indices: Int[AnyArray, "*b N"]
    valid: Bool[AnyArray, "*b N"]


def weighted_boxes_fusion(
    candidate_boxes: Float[Array, "N 4"],
    candidate_scores: Float[Array, " N"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    iou_threshold: float = 0.55,
    reported_variances: Float[Array, "N 4"] | None = None,
    variance_mode: str = "average",
) -> FusedClusters:
    """Weighted boxes fusion (Solovyev et al., Image and Vision Computing 2021), for one model.

    Candidates are placed in order of falling score (ties: the lower row first). Each joins the cluster of its
    class whose fused box, *as it stands then*, overlaps it most, if that IoU is above the threshold; else it
    opens a cluster. A fused box is the mean of its members, weighted by score. The score of a cluster is the
    mean of its members' scores: the paper's factor min(members, models) / models is 1 for a single model, so
    agreement among candidates is not rewarded. Agrees with the package `ensemble-boxes` (1.0.9, `avg`), which
    drops empty boxes and breaks ties otherwise.

    Clusters depend on boxes that move while they are made, so this is a loop over the valid candidates, N work
    in each turn; the means take N x N weights. Gradients are those of the means, with the clusters held fixed.

    Args:
        candidate_boxes: all boxes of an image, without any suppression.
        candidate_scores: not negative.
        candidate_classes: only equal classes are fused.
        candidate_valid: False rows are in no cluster, whatever they hold.
        iou_threshold: a candidate joins a cluster above this.
        reported_variances: variance of each edge, without a part in the weight; or None.
        variance_mode: as in `variance_voting`; the winner is the first member.

    Returns:
        N slots. An empty box, whose IoU is 0, stays alone.

    Raises:
        ValueError: if the threshold is not in [0, 1], or for an unknown mode.
    """
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"Weighted boxes fusion needs an iou_threshold in [0, 1], got {iou_threshold}.")
    boxes = jnp.where(candidate_valid[:, None], candidate_boxes, 0.0)
    scores = jnp.where(candidate_valid, candidate_scores, 0.0)
    cluster, indices, count = _cluster(
        *jax.lax.stop_gradient((boxes, scores)), candidate_classes, candidate_valid, iou_threshold
    )
    slots = jnp.arange(len(scores))
    valid = slots < count
    members = cluster[None, :] == slots[:, None]
    weights = jnp.where(members, scores[None, :], 0.0)
    fused = average_voters(
        boxes[indices],
        weights,
        boxes,
        candidate_valid,
        reported_variances=reported_variances,
        kept_variances=None if reported_variances is None else reported_variances[indices],
        variance_mode=variance_mode,
    )
    return FusedClusters(
        boxes=jnp.where(valid[:, None], fused.boxes, 0.0),
        scores=weights.sum(axis=1) / jnp.maximum(members.sum(axis=1), 1),
        classes=jnp.where(valid, candidate_classes[indices], 0),
        variances=fused.variances,
        indices=indices,
        valid=valid,
    )


def _cluster(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    valid: Bool[Array, " N"],
    iou_threshold: float,
) -> tuple[Int[Array, " N"], Int[Array, " N"], Int[Array, ""]]:
    """The slot of each candidate (N if it is not valid), the first member of each slot, and the slots used."""
    size = len(scores)
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf))

    def place(turn: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        fused, weights, fused_classes, indices, cluster, count = state
        row = order[turn]
        box, score, category = boxes[row], scores[row], classes[row]
        # Unused slots hold empty boxes, whose IoU is never above a threshold.
        iou = jnp.where(fused_classes == category, pairwise_iou(box[None], fused)[0], 0.0)
        best = jnp.argmax(iou)
        joins = iou[best] > iou_threshold
        slot = jnp.where(joins, best, count)
        weight = weights[slot] + score
        share = jnp.where(joins, score / jnp.where(weight > 0, weight, 1.0), 1.0)
        return (
            fused.at[slot].add(share * (box - fused[slot])),
            weights.at[slot].set(weight),
            fused_classes.at[slot].set(category),
            indices.at[slot].set(jnp.where(joins, indices[slot], row)),
            cluster.at[row].set(slot),
            jnp.where(joins, count, count + 1),
        )

    start = (
        jnp.zeros_like(boxes),
        jnp.zeros_like(scores),
        jnp.zeros_like(classes),
        jnp.zeros(size, order.dtype),
        jnp.full(size, size, order.dtype),
        jnp.zeros((), order.dtype),
    )
    # Most slots are padding when few candidates pass the score threshold: the loop ends with the valid ones.
    *_, indices, cluster, count = jax.lax.fori_loop(0, valid.sum(), place, start)
    return cluster, indices, count
