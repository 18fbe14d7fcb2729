"""Suppression by any method, from candidates to the boxes that are kept."""

from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.greedy_suppression import SuppressionResult
from klbox_jax.postprocess.greedy_suppression_by_class import greedy_suppression_by_class
from klbox_jax.postprocess.iou_guided_nms import iou_guided_nms
from klbox_jax.postprocess.settings import PostprocessSettings


def suppress(candidates: Candidates, settings: PostprocessSettings) -> SuppressionResult:
    """Keeps the best `settings.detections_per_image` boxes of an image; only boxes of one class act on each other.

    Hard NMS is greedy suppression whose factor is 0 or 1. For a hundred outputs of a thousand candidates that is faster
    than `ops.nms.hard_nms`, and makes no N x N matrix.

    Args:
        candidates: of all classes; with `predicted_ious` for `iou_guided`.
        settings: `suppression` and the fields of the method, `detections_per_image`.

    Returns:
        Best first; equal scores rank by row.

    Raises:
        ValueError: for `iou_guided` without predicted IoUs.
    """
    if settings.suppression == "iou_guided":
        if candidates.predicted_ious is None:
            raise ValueError("Suppression 'iou_guided' needs predicted_ious, those of an IoU head.")
        return iou_guided_nms(
            candidates.boxes,
            candidates.scores,
            candidates.predicted_ious,
            candidates.classes,
            candidates.valid,
            iou_threshold=settings.nms_threshold,
            max_outputs=settings.detections_per_image,
        )
    return greedy_suppression_by_class(candidates, settings.decay, max_outputs=settings.detections_per_image)
