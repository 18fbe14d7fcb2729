"""Greedy suppression in its plain form: one pick after the other, over all classes."""

from typing import Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.structures import AnyArray


@runtime_checkable
class Decay(Protocol):
    """Lowers the score of a box that overlaps a better one: `HardNMS`, `SoftNMS`, or a user's own.

    Attributes:
        min_score: a box is dropped once its score is below this (a score equal to it stays).
    """

    @property
    def min_score(self) -> float:
        """The score below which a box is dropped."""
        ...

    def __call__(self, iou: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Returns the factor on a score, in [0, 1], from the IoU with the box just picked."""
        ...


@flax.struct.dataclass
class SuppressionResult:
    """The boxes that suppression keeps, best first.

    Attributes:
        indices: rows of the input; 0 where not valid.
        scores: the scores when the boxes were picked; 0 where not valid.
        valid: False for an unused slot.
        num_picks_alive: for each row of the input, the number of picks before which it was still in the queue, its own
            pick included: pick `k`, from 0, was made among the rows with more than `k`. None for a method that does
            not pick one by one.
    """

    indices: Int[AnyArray, "*b D"]
    scores: Float[AnyArray, "*b D"]
    valid: Bool[AnyArray, "*b D"]
    num_picks_alive: Int[AnyArray, "*b N"] | None = None


def greedy_suppression(candidates: Candidates, decay: Decay, *, max_outputs: int) -> SuppressionResult:
    """Picks the best box, lowers the scores of the boxes of its class that overlap it, and repeats.

    A box is lowered by boxes of its own class only, and no score ever rises. So a later pick never outscores an earlier
    one: the first `max_outputs` picks are the result class by class, merged by score and cut. The cost is
    `max_outputs * N`, one row of the IoU matrix for each pick. `greedy_suppression_by_class` returns the same sooner.

    Args:
        candidates: of one image, boxes in any unit; rows that are not valid are neither picked nor counted.
        decay: factor on the score of an overlapping box.
        max_outputs: number of picks.

    Returns:
        `max_outputs` slots, scores not increasing; equal scores rank by row.
    """
    boxes, scores, classes = candidates.boxes, candidates.scores, candidates.classes

    def pick(state: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], tuple[Array, Array, Array]]:
        scores, remaining, num_picks_alive = state
        best = jnp.argmax(jnp.where(remaining, scores, -jnp.inf))
        found = remaining[best]
        result = (jnp.where(found, best, 0), jnp.where(found, scores[best], 0.0), found)
        iou = pairwise_iou(boxes[best][None], boxes)[0]
        scores = jnp.where(classes == classes[best], scores * decay(iou), scores)
        num_picks_alive = num_picks_alive + remaining
        remaining = remaining & (scores >= decay.min_score) & (jnp.arange(len(scores)) != best)
        return (scores, remaining, num_picks_alive), result

    start = (
        jnp.where(candidates.valid, scores, 0.0),
        candidates.valid & (scores >= decay.min_score),
        jnp.zeros(len(scores), jnp.int32),
    )
    (_, _, alive), (indices, picked_scores, found) = jax.lax.scan(pick, start, length=max_outputs)
    return SuppressionResult(indices=indices, scores=picked_scores, valid=found, num_picks_alive=alive)
