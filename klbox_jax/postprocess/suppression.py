"""Every way to thin out overlapping boxes, under one name and one result."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.postprocess.greedy_suppression import SuppressionResult
from klbox_jax.postprocess.greedy_suppression_by_class import pick_in_rounds
from klbox_jax.postprocess.iou_guided_nms import iou_guided_nms
from klbox_jax.postprocess.soft_nms import soft_nms

SUPPRESSION_METHODS = ("hard", "soft_linear", "soft_gaussian", "iou_guided")


def suppress(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    valid: Bool[Array, " N"],
    *,
    method: str,
    nms_threshold: float = 0.5,
    soft_nms_sigma: float = 0.5,
    soft_nms_threshold: float = 0.3,
    min_score: float = 0.001,
    max_outputs: int,
    predicted_ious: Float[Array, " N"] | None = None,
) -> SuppressionResult:
    """Keeps the best `max_outputs` boxes of an image; only boxes of one class act on each other.

    Args:
        boxes, scores, classes, valid: candidates of all classes; scores not negative.
        method: `hard` removes boxes whose IoU with a better kept one is above `nms_threshold` (strictly, as
            torchvision) and leaves scores alone; `soft_linear` and `soft_gaussian` are `soft_nms`;
            `iou_guided` is `iou_guided_nms`.
        nms_threshold: of `hard` and `iou_guided`.
        soft_nms_sigma: of `soft_gaussian`.
        soft_nms_threshold: of `soft_linear`.
        min_score: of both soft methods; `hard` keeps any positive score.
        max_outputs: number of slots.
        predicted_ious: of each candidate, for `iou_guided` alone.

    Returns:
        Best first; ties go to the lower row.

    Raises:
        ValueError: for an unknown method, or `iou_guided` without predicted IoUs.
    """
    if method == "iou_guided":
        if predicted_ious is None:
            raise ValueError("Suppression 'iou_guided' needs predicted_ious, those of an IoU head.")
        return iou_guided_nms(
            boxes,
            scores,
            predicted_ious,
            classes,
            valid,
            iou_threshold=nms_threshold,
            max_outputs=max_outputs,
        )
    if method not in SUPPRESSION_METHODS:
        raise ValueError(
            f"Unknown suppression method {method!r}; choose one of {', '.join(SUPPRESSION_METHODS)}."
        )
    if method == "hard":
        # Greedy NMS is the pick loop with an all-or-nothing decay. For a hundred outputs of a thousand
        # candidates that is faster than `ops.nms.hard_nms`, and makes no N x N matrix.
        return pick_in_rounds(
            boxes,
            scores,
            classes,
            valid,
            decay=lambda iou: jnp.where(iou > nms_threshold, 0.0, 1.0),
            min_score=float(jnp.finfo(jnp.float32).tiny),
            max_outputs=max_outputs,
        )
    return soft_nms(
        boxes,
        scores,
        classes,
        valid,
        method="linear" if method == "soft_linear" else "gaussian",
        sigma=soft_nms_sigma,
        iou_threshold=soft_nms_threshold,
        min_score=min_score,
        max_outputs=max_outputs,
    )
