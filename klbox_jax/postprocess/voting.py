"""Variance voting: a kept box is averaged with its neighbours, the certain ones first."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class VotingResult:
    """Voted boxes and the variance of each edge."""

    boxes: Float[AnyArray, "*b D 4"]
    variances: Float[AnyArray, "*b D 4"]


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
) -> VotingResult:
    """Variance voting of He et al. (CVPR 2019, Algorithm 1 and section 3.3), for each edge on its own.

    Every valid candidate of the same class with IoU > 0 votes for a kept box:

        p_i = exp(-(1 - IoU_i)^2 / sigma_t)        x = sum_i p_i x_i / var_i  /  sum_i p_i / var_i

    Class scores deliberately have no part in the weight. IoUs are those of the boxes before voting, so kept
    boxes do not influence each other. The variance that comes back is the average of the members' variances
    with the weights `p_i / var_i`. It is not the variance of an average of independent estimates: neighbours
    look at the same pixels, and that number would shrink with every duplicate.

    The paper votes with the variance of the *coded* offset, which weighs a large and a small box by relative
    certainty; hence two variances: `candidate_variances` weigh, `reported_variances` are averaged.

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
        reported_variances: variance of each edge in the unit wanted back, such as squared pixels;
            `candidate_variances` if None.

    Returns:
        Voted boxes inside the hull of their voters, and variances. A kept box that no candidate overlaps (a
        padded slot, an empty box) comes back unchanged, with variance 0.

    Raises:
        ValueError: if sigma_t is not positive.
    """
    if not sigma_t > 0:
        raise ValueError(f"Variance voting needs sigma_t > 0, got {sigma_t}.")
    if reported_variances is None:
        reported_variances = candidate_variances
    rows = candidate_valid[:, None]
    boxes = jnp.where(rows, candidate_boxes, 0.0)
    precisions = 1.0 / jnp.where(rows, candidate_variances, 1.0)
    reported = jnp.where(rows, reported_variances, 0.0)

    iou = pairwise_iou(kept_boxes, boxes)
    votes = (iou > 0) & candidate_valid[None, :] & (kept_classes[:, None] == candidate_classes[None, :])
    p = jnp.where(votes, jnp.exp(-jnp.square(1.0 - iou) / sigma_t), 0.0)

    # p does not depend on the edge, so three products of [D, N] with [N, 4] do, and no [D, N, 4] is made.
    columns = jnp.concatenate([boxes * precisions, reported * precisions, precisions], axis=1)
    # Accelerators would round the factors to 8 or 11 bits here, several pixels at x = 1000.
    sums = jnp.matmul(p, columns, precision=jax.lax.Precision.HIGHEST)
    box_sum, variance_sum, weight = jnp.split(sums, 3, axis=1)
    has_votes = weight > 0
    weight = jnp.where(has_votes, weight, 1.0)
    return VotingResult(
        boxes=jnp.where(has_votes, box_sum / weight, kept_boxes), variances=variance_sum / weight
    )
