"""Soft-NMS (Bodla et al., ICCV 2017): overlapping boxes lose score instead of being removed."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.postprocess.greedy_suppression import SuppressionResult
from klbox_jax.postprocess.greedy_suppression_by_class import pick_in_rounds


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
    return pick_in_rounds(
        boxes, scores, classes, valid, decay=decay, min_score=min_score, max_outputs=max_outputs
    )
