"""Fusion: all boxes of a cluster become one. BayesOD fuses around kept boxes, WBF makes its own clusters."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.voting import KeptBoxes, Votes, VotingResult, average, overlaps
from klbox_jax.structures import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class BayesFusion:
    """Bayesian fusion of BayesOD (Harakeh et al., ICRA 2020), with diagonal covariances.

    The members of a cluster are the valid candidates of the class whose IoU with its centre, the kept box, is above
    `affinity`. Each member is taken as an independent measurement of the same box, under a flat prior:

        1 / var = sum_i 1 / var_i          x = var * sum_i x_i / var_i

    Bayes' rule multiplies densities of one quantity, so the variances must be in the space in which the boxes are
    averaged: squared pixels, both as weights and as the result. `VarianceVoting` follows its paper instead and weighs
    by coded variances, which are relative to the size of each candidate's own proposal.

    Members share pixels, so `fused` claims too much certainty, by a factor of about their number. The authors' code
    (bayes-od-rc) multiplies the variance by 70, a number chosen on its data sets, and does not require members to have
    the centre's class; their later code (probdet) does, as here. Full covariances and the prior around the anchor are
    left out.

    Attributes:
        affinity: IoU above which a candidate belongs to the cluster; probdet also uses 0.9.
        calibration: factor on the variance of `fused`; the other modes need none.

    Raises:
        ValueError: the affinity is not in [0, 1), or the calibration not positive.
    """

    affinity: float = 0.7
    calibration: float = 1.0
    needs_variances = True

    def __post_init__(self):
        if not 0 <= self.affinity < 1:
            raise ValueError(f"Bayesian fusion needs an affinity in [0, 1), got {self.affinity}.")
        if not self.calibration > 0:
            raise ValueError(f"Bayesian fusion needs calibration > 0, got {self.calibration}.")

    def __call__(self, kept: KeptBoxes, candidates: Candidates) -> Votes:
        """Returns weight 1 for each member, and the variances in squared pixels as its divisors."""
        iou, peers = overlaps(kept, candidates)
        return Votes(
            weights=(peers & (iou > self.affinity)).astype(candidates.boxes.dtype),
            edge_variances=candidates.pixel_variances,
            fused_factor=self.calibration,
        )


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
    **options,
) -> VotingResult:
    """Fuses the neighbours of each kept box by `BayesFusion`, as a function of arrays.

    Args:
        kept_boxes: boxes that suppression left; the centres of the clusters.
        kept_classes: their classes.
        candidate_boxes: the boxes before suppression, in pixels.
        candidate_variances: variance of each edge in squared pixels, positive.
        candidate_classes: their classes.
        candidate_valid: False rows are in no cluster.
        affinity, calibration: fields of `BayesFusion`.
        **options: `kept_variances` and `variance_mode` of `VotingOptions`; the mode is "fused" by default, the
            published one.

    Returns:
        As `average`.

    Raises:
        ValueError: as `BayesFusion` and `average`.
    """
    unknown = options.keys() - {"kept_variances", "variance_mode"}
    if unknown:
        raise TypeError(f"bayes_fusion got an unexpected keyword argument {min(unknown)!r}")
    members = Candidates(
        boxes=candidate_boxes,
        scores=None,
        classes=candidate_classes,
        valid=candidate_valid,
        pixel_variances=candidate_variances,
    )
    kept = KeptBoxes(boxes=kept_boxes, classes=kept_classes, variances=options.get("kept_variances"))
    method = BayesFusion(affinity=affinity, calibration=calibration)
    mode = options.get("variance_mode", "fused")
    return average(kept, members, method(kept, members), variance_mode=mode)


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
    """Makes clusters of boxes and averages each (Solovyev et al., Image and Vision Computing 2021), for one model.

    Candidates are placed in order of falling score (ties: the lower row first). Each joins the cluster of its class
    whose fused box, *as it is at that time*, overlaps it most, if that IoU is above the threshold; otherwise it opens a
    cluster. A fused box is the mean of its members, weighted by score. The score of a cluster is the mean of its
    members' scores: the paper's factor min(members, models) / models is 1 for a single model, so agreement among
    candidates is not rewarded. Agrees with the package `ensemble-boxes` (1.0.9, `avg`), which drops empty boxes and
    breaks ties in another way.

    Clusters depend on boxes that move while they are made, so this is a loop over the valid candidates, with N work in
    each turn; the means take N x N weights. Gradients are those of the means, with the clusters held fixed.

    Args:
        candidate_boxes: all boxes of an image, without any suppression.
        candidate_scores: not negative.
        candidate_classes: only boxes of one class are fused.
        candidate_valid: False rows are in no cluster, whatever they hold.
        iou_threshold: a candidate joins a cluster above this IoU.
        reported_variances: variance of each edge, without a part in the weight; or None.
        variance_mode: one of `VARIANCE_MODES`; the winner is the first member.

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
    first = KeptBoxes(
        boxes=boxes[indices],
        classes=candidate_classes,
        variances=None if reported_variances is None else reported_variances[indices],
    )
    voters = Candidates(
        boxes=boxes,
        scores=scores,
        classes=candidate_classes,
        valid=candidate_valid,
        pixel_variances=reported_variances,
    )
    fused = average(first, voters, Votes(weights=weights), variance_mode=variance_mode)
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
    """Returns the slot of each candidate (N if it is not valid), the first member of each slot, and the slots used."""
    size = len(scores)
    if size == 0:
        nothing = jnp.zeros(0, jnp.int32)
        return nothing, nothing, jnp.zeros((), jnp.int32)
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
