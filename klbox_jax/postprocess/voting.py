"""Voting: a kept box becomes the weighted mean of its neighbours, each edge on its own.

The methods differ in the weight alone:

    variance_voting   p / variance   He et al., CVPR 2019
    iou_voting        p              where a head predicts no variances
    box_voting        score          IoU >= threshold; Gidaris and Komodakis, ICCV 2015

with p = exp(-(1 - IoU)^2 / sigma_t). The first two can weigh by the class score too, the confident neighbours first;
the settings call that `variance_score` and `iou_score`. `fusion` has two more. What the variance that comes back means
is a choice of its own, `variance_mode`. With weights w_i and variances var_i of the voters:

    average   sum w_i var_i / sum w_i: how uncertain a voter is. Duplicates do not change it.
    fused     sum w_i^2 var_i / (sum w_i)^2: the variance of the mean, were the voters independent. They are
              not, they look at the same pixels; so it is too small, and shrinks with every duplicate.
    winner    the variance of the kept box itself, as if it had not been moved.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.structures import AnyArray

VARIANCE_MODES = ("average", "fused", "winner")


@flax.struct.dataclass
class VotingResult:
    """Voted boxes and the variance of each edge, None where no variances were given."""

    boxes: Float[AnyArray, "*b D 4"]
    variances: Float[AnyArray, "*b D 4"] | None


def variance_voting(
    kept_boxes: Float[Array, "D 4"],
    kept_classes: Int[Array, " D"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_variances: Float[Array, "N 4"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    sigma_t: float = 0.02,
    iou_floor: float = 0.0,
    reported_variances: Float[Array, "N 4"] | None = None,
    kept_variances: Float[Array, "D 4"] | None = None,
    variance_mode: str = "average",
    voters: Bool[Array, "D N"] | None = None,
    candidate_scores: Float[Array, " N"] | None = None,
) -> VotingResult:
    """Variance voting of He et al. (CVPR 2019, Algorithm 1 and section 3.3), for each edge on its own.

    Every valid candidate of the same class with IoU > 0 (`iou_floor`) votes for a kept box:

        p_i = exp(-(1 - IoU_i)^2 / sigma_t)        x = sum_i p_i x_i / var_i  /  sum_i p_i / var_i

    Class scores deliberately have no part in the paper's weight. `candidate_scores` gives them one, a departure of
    ours: the regression is trained on objects alone, so that the offsets and variances of a box that hardly looks
    like one are worth less. IoUs are those of the boxes before voting, so kept boxes do not influence each other.

    The paper votes with the variance of the *coded* offset, which weighs a large and a small box by relative
    certainty; hence two variances: `candidate_variances` weigh, `reported_variances` come back.

    Args:
        kept_boxes: what suppression left, before voting; each is normally a candidate itself and then votes
            with p = 1.
        kept_classes: their classes.
        candidate_boxes: the boxes before suppression, in the space of `kept_boxes`.
        candidate_variances: variance of each edge, positive, any common unit; the weights.
        candidate_classes: their classes.
        candidate_valid: False rows have no vote, whatever they hold.
        sigma_t: width of p; smaller trusts only the closest neighbours. The paper's value is 0.02, the
            official code's default 0.01.
        iou_floor: a candidate votes above this IoU: 0 in the paper, 0.01 in the official code, where p is next
            to nothing anyway.
        reported_variances: variance of each edge in the unit wanted back, such as squared pixels;
            `candidate_variances` if None.
        kept_variances: those of the kept boxes, in the same unit; only `winner` reads them.
        variance_mode: one of `VARIANCE_MODES`, see the top of this file.
        voters: the candidates that may vote for each kept box, all of them if None.
        candidate_scores: class scores before suppression, not negative, which p is multiplied by; one of 0 has no
            vote. Not a part of the weight if None.

    Returns:
        Voted boxes inside the hull of their voters, and variances. A kept box that no candidate overlaps (a
        padded slot, an empty box) comes back unchanged, with variance 0 in every mode.

    Raises:
        ValueError: if sigma_t is not positive, for an unknown mode, or `winner` without `kept_variances`.
    """
    iou, peers = overlaps(
        kept_boxes, kept_classes, candidate_boxes, candidate_classes, candidate_valid, voters=voters
    )
    return average_voters(
        kept_boxes,
        _proximity(iou, peers, sigma_t, iou_floor, candidate_scores),
        candidate_boxes,
        candidate_valid,
        weight_variances=candidate_variances,
        reported_variances=candidate_variances if reported_variances is None else reported_variances,
        kept_variances=kept_variances,
        variance_mode=variance_mode,
    )


def iou_voting(
    kept_boxes: Float[Array, "D 4"],
    kept_classes: Int[Array, " D"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    sigma_t: float = 0.02,
    iou_floor: float = 0.0,
    reported_variances: Float[Array, "N 4"] | None = None,
    kept_variances: Float[Array, "D 4"] | None = None,
    variance_mode: str = "average",
    voters: Bool[Array, "D N"] | None = None,
    candidate_scores: Float[Array, " N"] | None = None,
) -> VotingResult:
    """Voting without variances: the weight is p_i alone, so any head can vote.

    It is `variance_voting` with equal variances. The idea is that of the reading note on KL Loss in
    patrick-llgc/Learning-Deep-Learning; the paper does not try it.

    Args:
        reported_variances: variance of each candidate's edges, without a part in the weight; None for a head
            without variances, and none come back.
        kept_boxes, kept_classes, candidate_boxes, candidate_classes, candidate_valid: as in `variance_voting`.
        sigma_t, iou_floor, kept_variances, variance_mode, voters, candidate_scores: as there.

    Returns:
        As `variance_voting`.

    Raises:
        ValueError: as there.
    """
    iou, peers = overlaps(
        kept_boxes, kept_classes, candidate_boxes, candidate_classes, candidate_valid, voters=voters
    )
    return average_voters(
        kept_boxes,
        _proximity(iou, peers, sigma_t, iou_floor, candidate_scores),
        candidate_boxes,
        candidate_valid,
        reported_variances=reported_variances,
        kept_variances=kept_variances,
        variance_mode=variance_mode,
    )


def box_voting(
    kept_boxes: Float[Array, "D 4"],
    kept_classes: Int[Array, " D"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_scores: Float[Array, " N"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    iou_threshold: float = 0.5,
    reported_variances: Float[Array, "N 4"] | None = None,
    kept_variances: Float[Array, "D 4"] | None = None,
    variance_mode: str = "average",
    voters: Bool[Array, "D N"] | None = None,
) -> VotingResult:
    """Bounding-box voting of MR-CNN (Gidaris and Komodakis, ICCV 2015): the mean of the near, by score.

    The threshold is inclusive, as in their code and in Detectron's `box_voting`, with which this agrees for
    its score method `ID` (the kept box's score stays). Detectron's threshold is 0.8 by default.

    Args:
        candidate_scores: class scores before suppression, not negative. One of 0 has no vote.
        iou_threshold: a candidate of the class votes if its IoU with the kept box is at least this. At 0
            the whole class votes, even boxes that do not touch.
        kept_boxes, kept_classes, candidate_boxes, candidate_classes, candidate_valid: as in `variance_voting`.
        reported_variances, kept_variances, variance_mode, voters: as in `iou_voting`.

    Returns:
        As `variance_voting`.

    Raises:
        ValueError: if the threshold is not in [0, 1], or as `variance_voting` for the variances.
    """
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"Box voting needs an iou_threshold in [0, 1], got {iou_threshold}.")
    iou, peers = overlaps(
        kept_boxes, kept_classes, candidate_boxes, candidate_classes, candidate_valid, voters=voters
    )
    scores = jnp.where(candidate_valid, candidate_scores, 0.0)
    return average_voters(
        kept_boxes,
        jnp.where(peers & (iou >= iou_threshold), scores[None, :], 0.0),
        candidate_boxes,
        candidate_valid,
        reported_variances=reported_variances,
        kept_variances=kept_variances,
        variance_mode=variance_mode,
    )


def overlaps(
    kept_boxes: Float[Array, "D 4"],
    kept_classes: Int[Array, " D"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    voters: Bool[Array, "D N"] | None = None,
) -> tuple[Float[Array, "D N"], Bool[Array, "D N"]]:
    """The IoU of each kept box with each candidate, and whether the candidate may vote for it.

    It may if it is valid, of the class and, where `voters` is given, one of them.
    """
    iou = pairwise_iou(kept_boxes, jnp.where(candidate_valid[:, None], candidate_boxes, 0.0))
    peers = candidate_valid[None, :] & (kept_classes[:, None] == candidate_classes[None, :])
    return iou, peers if voters is None else peers & voters


def _proximity(
    iou: Float[Array, "D N"],
    peers: Bool[Array, "D N"],
    sigma_t: float,
    iou_floor: float,
    scores: Float[Array, " N"] | None,
) -> Float[Array, "D N"]:
    """The weight p, times the scores where there are any; 0 for a candidate without a vote."""
    if not sigma_t > 0:
        raise ValueError(f"Voting by IoU needs sigma_t > 0, got {sigma_t}.")
    weights = jnp.exp(-jnp.square(1.0 - iou) / sigma_t)
    if scores is not None:
        # An unused slot may hold anything, which its gradient must not see.
        weights = weights * jnp.where(peers, scores[None, :], 0.0)
    return jnp.where(peers & (iou > iou_floor), weights, 0.0)


def average_voters(
    kept_boxes: Float[Array, "D 4"],
    weights: Float[Array, "D N"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_valid: Bool[Array, " N"],
    *,
    weight_variances: Float[Array, "N 4"] | None = None,
    reported_variances: Float[Array, "N 4"] | None = None,
    kept_variances: Float[Array, "D 4"] | None = None,
    variance_mode: str = "average",
) -> VotingResult:
    """The weighted mean under every vote, and the variance that is reported for it.

    The weight of an edge is a factor of the pair, the same for all four edges, over a variance of the edge.
    So products of [D, N] with [N, 4] do, and no [D, N, 4] is made.

    Args:
        weights: the factor of the pair, 0 for a candidate without a vote (one that is not valid has none).
        weight_variances: variances that the factor is divided by; equal ones if None.
        kept_boxes, candidate_boxes, candidate_valid, kept_variances, variance_mode: as in `variance_voting`.
        reported_variances: as in `iou_voting`.

    Raises:
        ValueError: for an unknown mode, or `winner` without the variances that it returns.
    """
    if variance_mode not in VARIANCE_MODES:
        raise ValueError(f"variance_mode must be one of {', '.join(VARIANCE_MODES)}; got {variance_mode!r}.")
    if variance_mode == "winner" and kept_variances is None and reported_variances is not None:
        raise ValueError("variance_mode='winner' returns kept_variances, which are missing; pass them.")
    rows = candidate_valid[:, None]
    boxes = jnp.where(rows, candidate_boxes, 0.0)
    divisors = jnp.ones_like(boxes) if weight_variances is None else weight_variances
    precisions = 1.0 / jnp.where(rows, divisors, 1.0)
    if variance_mode == "fused":
        # Only ratios matter; without this the squares of small scores would underflow.
        largest = jax.lax.stop_gradient(jnp.max(weights, axis=1, keepdims=True, initial=0.0))
        weights = weights / jnp.where(largest > 0, largest, 1.0)

    # Accelerators would round the factors to 8 or 11 bits here, several pixels at x = 1000.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    # One product of all sums reads the [D, N] weights once.
    columns = [precisions, boxes * precisions]
    if variance_mode == "average" and reported_variances is not None:
        columns.append(jnp.where(rows, reported_variances, 0.0) * precisions)
    total, *sums = jnp.split(product(weights, jnp.concatenate(columns, axis=1)), len(columns), axis=1)
    has_votes = total > 0
    total = jnp.where(has_votes, total, 1.0)
    voted = jnp.where(has_votes, sums[0] / total, kept_boxes)

    if variance_mode == "winner":
        variances = None if kept_variances is None else jnp.where(has_votes, kept_variances, 0.0)
    elif reported_variances is None:
        variances = None
    elif variance_mode == "average":
        variances = sums[1] / total
    else:
        reported = jnp.where(rows, reported_variances, 0.0)
        variances = product(jnp.square(weights), reported * jnp.square(precisions)) / jnp.square(total)
    return VotingResult(boxes=voted, variances=variances)
