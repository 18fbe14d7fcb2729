"""The loop under every suppression that ranks and lowers by one score."""

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
    """Picks the best box, lowers the scores of the boxes of its class that overlap it, and repeats.

    The plain form: one pick after the other, over all classes. A box is lowered by its own class alone, and no box
    ever gains score, so a later pick never outscores an earlier one: the first `max_outputs` picks are the
    class-by-class result, merged by score and cut. The cost is `max_outputs * N`, one row of the IoU matrix for each
    pick. `pick_rounds` returns the same sooner.

    Args:
        boxes: one space, any units.
        scores: not negative.
        classes: only equal classes lower each other.
        valid: False rows are neither picked nor counted.
        decay: factor in [0, 1] on the score of a box, from its IoU with the box just picked.
        min_score: a box is dropped once its score is below this (one that equals it stays).
        max_outputs: number of picks.

    Returns:
        `max_outputs` slots, scores not increasing; ties go to the lower row.
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
