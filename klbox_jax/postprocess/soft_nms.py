"""Soft-NMS (Bodla et al., ICCV 2017): overlapping boxes lose score instead of being removed."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class SuppressionResult:
    """The boxes that a suppression keeps, best first.

    Attributes:
        indices: rows of the input; 0 where not valid.
        scores: their scores when they were picked; 0 where not valid.
        valid: False for an unused slot.
        turns: for each row of the input, the picks for which it was still in the queue, its own included: pick `k`,
            from 0, was made among the rows with more than `k`. None where boxes are not picked one by one.
    """

    indices: Int[AnyArray, "*b D"]
    scores: Float[AnyArray, "*b D"]
    valid: Bool[AnyArray, "*b D"]
    turns: Int[AnyArray, "*b N"] | None = None


def soft_nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    valid: Bool[Array, " N"],
    *,
    method: str,
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    min_score: float = 0.001,
    max_outputs: int,
) -> SuppressionResult:
    """Picks the best box, lowers the scores of the boxes of its class that overlap it, and repeats.

    All classes run at once. A box is lowered by its own class alone, and no box ever gains score, so a later
    pick never outscores an earlier one: the first `max_outputs` picks are the class-by-class result, merged
    by score and cut. The cost is `max_outputs * N`, one row of the IoU matrix for each pick.

    Args:
        boxes: one space, any units.
        scores: not negative.
        classes: only equal classes lower each other.
        valid: False rows are neither picked nor counted.
        method: `linear` multiplies by `1 - IoU` where `IoU >= iou_threshold`; `gaussian` by
            `exp(-IoU^2 / sigma)` everywhere.
        sigma: width of the Gaussian.
        iou_threshold: where the linear decay starts.
        min_score: a box is dropped once its score is below this (one that equals it stays).
        max_outputs: number of picks.

    Returns:
        `max_outputs` slots, scores not increasing; ties go to the lower row.

    Raises:
        ValueError: for an unknown method.
    """
    if method == "linear":

        def decay(iou: Array) -> Array:
            return jnp.where(iou >= iou_threshold, 1.0 - iou, 1.0)

    elif method == "gaussian":

        def decay(iou: Array) -> Array:
            return jnp.exp(-jnp.square(iou) / sigma)

    else:
        raise ValueError(f"Unknown soft-NMS method {method!r}; choose 'linear' or 'gaussian'.")
    return pick_sequentially(
        boxes, scores, classes, valid, decay=decay, min_score=min_score, max_outputs=max_outputs
    )


def pick_sequentially(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    valid: Bool[Array, " N"],
    *,
    decay: Callable[[Array], Array],
    min_score: float,
    max_outputs: int,
) -> SuppressionResult:
    """The loop under every suppression that ranks and lowers by one score.

    Args:
        boxes, scores, classes, valid, min_score, max_outputs: as in `soft_nms`.
        decay: factor in [0, 1] on the score of a box, from its IoU with the box just picked.
    """

    def pick(state: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], tuple[Array, Array, Array]]:
        scores, remaining, turns = state
        best = jnp.argmax(jnp.where(remaining, scores, -jnp.inf))
        found = remaining[best]
        result = (jnp.where(found, best, 0), jnp.where(found, scores[best], 0.0), found)
        iou = pairwise_iou(boxes[best][None], boxes)[0]
        scores = jnp.where(classes == classes[best], scores * decay(iou), scores)
        turns = turns + remaining
        remaining = remaining & (scores >= min_score) & (jnp.arange(len(scores)) != best)
        return (scores, remaining, turns), result

    start = (
        jnp.where(valid, scores, 0.0),
        valid & (scores >= min_score),
        jnp.zeros(len(scores), jnp.int32),
    )
    (_, _, turns), (indices, picked_scores, found) = jax.lax.scan(pick, start, length=max_outputs)
    return SuppressionResult(indices=indices, scores=picked_scores, valid=found, turns=turns)
