"""Voting: each edge of a kept box becomes the weighted mean of its neighbours' edges.

The methods differ only in the weight of a neighbour:

    VarianceVoting   p / variance   He et al., CVPR 2019
    IoUVoting        p              for a head without variances
    BoxVoting        score          where IoU >= threshold; Gidaris and Komodakis, ICCV 2015

with p = exp(-(1 - IoU)^2 / sigma_t). The first two can also multiply by the class score, so that confident neighbours
count more (`variance_score` and `iou_score` in the settings). `fusion` has two more methods.

The variance that is returned is a choice of its own, `variance_mode`. With weights w_i and variances var_i of the
voters:

    average   sum w_i var_i / sum w_i: the mean uncertainty of the voters. Duplicates do not change it.
    fused     sum w_i^2 var_i / (sum w_i)^2: the variance of the mean if the voters were independent. They are not, for
              they see the same pixels; so it is too small, and shrinks with every duplicate.
    winner    the variance of the kept box itself, as if it had not moved.
"""

import dataclasses
import functools
from typing import Protocol, TypedDict, Unpack, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.released_code import in_detectron_order
from klbox_jax.structures import AnyArray

VARIANCE_MODES = ("average", "fused", "winner")


@flax.struct.dataclass
class VotingResult:
    """Voted boxes and the variance of each edge, None where no variances were given."""

    boxes: Float[AnyArray, "*b D 4"]
    variances: Float[AnyArray, "*b D 4"] | None


@flax.struct.dataclass
class KeptBoxes:
    """The boxes that suppression kept, before voting.

    Attributes:
        boxes: in the space of the candidates; each box is normally a candidate itself.
        classes: only candidates of the same class vote.
        variances: of each edge, in the unit that is returned; read by `winner` only.
        voters: the candidates that may vote for each kept box; all of them if None.
    """

    boxes: Float[AnyArray, "*b D 4"]
    classes: Int[AnyArray, "*b D"]
    variances: Float[AnyArray, "*b D 4"] | None = None
    voters: Bool[AnyArray, "*b D N"] | None = None


@flax.struct.dataclass
class Votes:
    """The weights of a vote: a factor of each pair, the same for its four edges, over a variance of each edge.

    Attributes:
        weights: factor of kept box and candidate, not negative; 0 for a candidate without a vote.
        edge_variances: variance of each candidate's edges, by which the factor is divided; equal ones if None.
        fused_factor: factor on a variance of mode `fused`, or None.
    """

    weights: Float[AnyArray, "*b D N"]
    edge_variances: Float[AnyArray, "*b N 4"] | None = None
    fused_factor: float | None = flax.struct.field(pytree_node=False, default=None)


@runtime_checkable
class VotingMethod(Protocol):
    """Weighs the candidates for each kept box. A user's own method is a frozen dataclass with this call.

    A class attribute `needs_variances = True` lets a head without variances be refused early. docs/extend.md has an
    example.
    """

    def __call__(self, kept: KeptBoxes, candidates: Candidates) -> Votes:
        """Returns the weights; `overlaps` says which pairs may have one."""
        ...


def overlaps(kept: KeptBoxes, candidates: Candidates) -> tuple[Float[Array, "D N"], Bool[Array, "D N"]]:
    """Returns the IoU of each kept box with each candidate, and True where the candidate may vote for it.

    It may vote if it is valid, of the same class and, where `kept.voters` is given, one of these. IoUs are those of the
    boxes before voting, so kept boxes do not influence each other.
    """
    iou = pairwise_iou(kept.boxes, jnp.where(candidates.valid[:, None], candidates.boxes, 0.0))
    peers = candidates.valid[None, :] & (kept.classes[:, None] == candidates.classes[None, :])
    return iou, peers if kept.voters is None else peers & kept.voters


@dataclasses.dataclass(frozen=True, kw_only=True)
class IoUVoting:
    """Weight p, with or without the class score: voting for any head.

    It is variance voting with equal variances. The idea is from the reading note on KL Loss in
    patrick-llgc/Learning-Deep-Learning; the paper does not try it.

    Attributes:
        sigma_t: width of p; a smaller width trusts only the closest neighbours. The paper's value is 0.02, the official
            code's default 0.01.
        by_score: multiply p by the class score before suppression; a candidate of score 0 has no vote.
        iou_floor: a candidate votes if its IoU is above this: 0 in the paper, 0.01 in the official code, where p is
            close to 0 anyway.

    Raises:
        ValueError: sigma_t is not positive.
    """

    sigma_t: float = 0.02
    by_score: bool = False
    iou_floor: float = 0.0

    def __post_init__(self):
        if not self.sigma_t > 0:
            raise ValueError(f"Voting by IoU needs sigma_t > 0, got {self.sigma_t}.")

    def __call__(self, kept: KeptBoxes, candidates: Candidates) -> Votes:
        """Returns p, times the scores if `by_score`."""
        iou, peers = overlaps(kept, candidates)
        weights = jnp.exp(-jnp.square(1.0 - iou) / self.sigma_t)
        if self.by_score:
            # An unused slot may hold anything, which its gradient must not see.
            weights = weights * jnp.where(peers, candidates.scores[None, :], 0.0)
        return Votes(weights=jnp.where(peers & (iou > self.iou_floor), weights, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceVoting(IoUVoting):
    """Weight p over the variance of each edge: variance voting of He et al. (CVPR 2019, Algorithm 1).

        p_i = exp(-(1 - IoU_i)^2 / sigma_t)        x = sum_i p_i x_i / var_i  /  sum_i p_i / var_i

    The variance is that of the *coded* offset, as in the paper, which weighs a large and a small box by their relative
    certainty. Class scores have no part in the paper's weight. `by_score`, an addition of ours, gives them one: the
    regression is trained on objects only, so the offsets and variances of a box that hardly looks like one are worth
    less.

    Attributes:
        variance_order: `corners` divides each edge by its own variance; `detectron` is the release's order, see
            `released_code`.
    """

    variance_order: str = "corners"
    needs_variances = True

    def __call__(self, kept: KeptBoxes, candidates: Candidates) -> Votes:
        """Returns p as the weight and the coded variances as its divisors."""
        variances = candidates.coded_variances
        if self.variance_order == "detectron":
            variances = in_detectron_order(variances)
        return super().__call__(kept, candidates).replace(edge_variances=variances)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxVoting:
    """Weight equal to the score, of the boxes near the kept one: MR-CNN (Gidaris and Komodakis, ICCV 2015).

    Agrees with Detectron's `box_voting` for its score method `ID` (the kept box's score stays), where the threshold is
    0.8 by default.

    Attributes:
        iou_threshold: a candidate of the class votes if its IoU with the kept box is at least this (inclusive, as in
            their code). At 0 the whole class votes, even boxes that do not touch.

    Raises:
        ValueError: the threshold is not in [0, 1].
    """

    iou_threshold: float = 0.5

    def __post_init__(self):
        if not 0 <= self.iou_threshold <= 1:
            raise ValueError(f"Box voting needs an iou_threshold in [0, 1], got {self.iou_threshold}.")

    def __call__(self, kept: KeptBoxes, candidates: Candidates) -> Votes:
        """Returns the scores before suppression of the near candidates; one of score 0 has no vote."""
        iou, peers = overlaps(kept, candidates)
        scores = jnp.where(candidates.valid, candidates.scores, 0.0)
        return Votes(weights=jnp.where(peers & (iou >= self.iou_threshold), scores[None, :], 0.0))


def average(
    kept: KeptBoxes, candidates: Candidates, votes: Votes, *, variance_mode: str = "average"
) -> VotingResult:
    """Returns the weighted mean of each edge, and its variance.

    The weight of an edge is a factor of the pair over a variance of the edge. So products of [D, N] with [N, 4] do, and
    no [D, N, 4] is made.

    Args:
        kept: D boxes.
        candidates: N voters; invalid rows have no vote, whatever they hold.
        votes: the weights.
        variance_mode: one of `VARIANCE_MODES`. The variances returned are made from `candidates.pixel_variances`.

    Returns:
        Voted boxes inside the hull of their voters, and variances. A kept box whose weights are all 0 (no candidate
        overlaps it, or p underflows for all that do) comes back unchanged, with variance 0 in every mode.

    Raises:
        ValueError: for an unknown mode, or `winner` without variances of the kept boxes.
    """
    if variance_mode not in VARIANCE_MODES:
        raise ValueError(f"variance_mode must be one of {', '.join(VARIANCE_MODES)}; got {variance_mode!r}.")
    variances = candidates.pixel_variances
    if variance_mode == "winner" and kept.variances is None and variances is not None:
        raise ValueError("variance_mode='winner' returns kept_variances, which are missing; pass them.")
    rows = candidates.valid[:, None]
    boxes = jnp.where(rows, candidates.boxes, 0.0)
    divisors = jnp.ones_like(boxes) if votes.edge_variances is None else votes.edge_variances
    precisions = 1.0 / jnp.where(rows, divisors, 1.0)
    weights = votes.weights
    if variance_mode == "fused":
        # Only ratios matter. Without this the squares of small scores would underflow.
        largest = jax.lax.stop_gradient(jnp.max(weights, axis=1, keepdims=True, initial=0.0))
        weights = weights / jnp.where(largest > 0, largest, 1.0)

    # Accelerators would round the factors to 8 or 11 bits here, several pixels at x = 1000.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    # One product for all sums reads the [D, N] weights once.
    columns = [precisions, boxes * precisions]
    if variance_mode == "average" and variances is not None:
        columns.append(jnp.where(rows, variances, 0.0) * precisions)
    total, *sums = jnp.split(product(weights, jnp.concatenate(columns, axis=1)), len(columns), axis=1)
    has_votes = total > 0
    total = jnp.where(has_votes, total, 1.0)
    voted = jnp.where(has_votes, sums[0] / total, kept.boxes)

    if variance_mode == "winner":
        output = None if kept.variances is None else jnp.where(has_votes, kept.variances, 0.0)
    elif variances is None:
        output = None
    elif variance_mode == "average":
        output = sums[1] / total
    else:
        used = jnp.where(rows, variances, 0.0)
        output = product(jnp.square(weights), used * jnp.square(precisions)) / jnp.square(total)
        if votes.fused_factor is not None:
            output = votes.fused_factor * output
    return VotingResult(boxes=voted, variances=output)


# The same as functions of arrays, for use without the records.


class VotingOptions(TypedDict, total=False):
    """Further arguments of the voting functions below, all optional.

    Attributes:
        kept_variances: variances of the kept boxes, in the unit of `reported_variances`; only `winner` reads them.
        variance_mode: one of `VARIANCE_MODES`, "average" by default.
        voters: [D, N], the candidates that may vote for each kept box; all by default.
        iou_floor: field of `IoUVoting`, 0 by default; `box_voting` ignores it.
        candidate_scores: [N], multiplied into p (`by_score`); `box_voting` takes scores as an argument and ignores it.
    """

    kept_variances: Float[Array, "D 4"] | None
    variance_mode: str
    voters: Bool[Array, "D N"] | None
    iou_floor: float
    candidate_scores: Float[Array, " N"] | None


def variance_voting(
    kept_boxes: Float[Array, "D 4"],
    kept_classes: Int[Array, " D"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_variances: Float[Array, "N 4"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    sigma_t: float = 0.02,
    reported_variances: Float[Array, "N 4"] | None = None,
    **options: Unpack[VotingOptions],
) -> VotingResult:
    """Votes by `VarianceVoting`, for each edge on its own.

    Args:
        kept_boxes: boxes that suppression left, before voting.
        kept_classes: their classes.
        candidate_boxes: the boxes before suppression, in the space of `kept_boxes`.
        candidate_variances: variance of each edge, positive, in any common unit; the weights.
        candidate_classes: their classes.
        candidate_valid: False rows have no vote, whatever they hold.
        sigma_t: width of p.
        reported_variances: variance of each edge in the unit wanted back, such as squared pixels;
            `candidate_variances` if None.
        **options: see `VotingOptions`.

    Returns:
        As `average`.

    Raises:
        ValueError: sigma_t is not positive, or as `average`.
    """
    scores = options.get("candidate_scores")
    voters = Candidates(
        boxes=candidate_boxes,
        scores=scores,
        classes=candidate_classes,
        valid=candidate_valid,
        coded_variances=candidate_variances,
        pixel_variances=candidate_variances if reported_variances is None else reported_variances,
    )
    method = VarianceVoting(
        sigma_t=sigma_t, by_score=scores is not None, iou_floor=options.get("iou_floor", 0.0)
    )
    return _vote(kept_boxes, kept_classes, voters, method, options)


def iou_voting(
    kept_boxes: Float[Array, "D 4"],
    kept_classes: Int[Array, " D"],
    candidate_boxes: Float[Array, "N 4"],
    candidate_classes: Int[Array, " N"],
    candidate_valid: Bool[Array, " N"],
    *,
    sigma_t: float = 0.02,
    reported_variances: Float[Array, "N 4"] | None = None,
    **options: Unpack[VotingOptions],
) -> VotingResult:
    """Votes by `IoUVoting`. Arguments as in `variance_voting`; without `reported_variances` none are returned."""
    scores = options.get("candidate_scores")
    voters = Candidates(
        boxes=candidate_boxes,
        scores=scores,
        classes=candidate_classes,
        valid=candidate_valid,
        pixel_variances=reported_variances,
    )
    method = IoUVoting(sigma_t=sigma_t, by_score=scores is not None, iou_floor=options.get("iou_floor", 0.0))
    return _vote(kept_boxes, kept_classes, voters, method, options)


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
    **options: Unpack[VotingOptions],
) -> VotingResult:
    """Votes by `BoxVoting`, with class scores before suppression; other arguments as in `iou_voting`."""
    voters = Candidates(
        boxes=candidate_boxes,
        scores=candidate_scores,
        classes=candidate_classes,
        valid=candidate_valid,
        pixel_variances=reported_variances,
    )
    method = BoxVoting(iou_threshold=iou_threshold)
    return _vote(kept_boxes, kept_classes, voters, method, options)


def _vote(kept_boxes, kept_classes, candidates, method, options: VotingOptions) -> VotingResult:
    unknown = options.keys() - VotingOptions.__annotations__
    if unknown:
        raise TypeError(f"a voting function got an unexpected keyword argument {min(unknown)!r}")
    kept = KeptBoxes(
        boxes=kept_boxes,
        classes=kept_classes,
        variances=options.get("kept_variances"),
        voters=options.get("voters"),
    )
    mode = options.get("variance_mode", "average")
    return average(kept, candidates, method(kept, candidates), variance_mode=mode)
