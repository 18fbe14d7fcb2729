"""Selection of the (proposal, class) pairs that may become detections, and their decoding."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.losses.box_regression import kl_variance_of
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import clip_to_image, is_nonempty
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.fusion import weighted_boxes_fusion
from klbox_jax.postprocess.released_code import end_at_last_pixel
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import BoxPredictions, Proposals

# Sides in pixels. A thinner box is as good as empty: its IoU, even with itself, means nothing.
_MIN_SIZE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoder of the outputs for one image to boxes and variances.

    Attributes:
        image_size: true height and width inside the canvas; boxes are clipped to it.
        box_coder: the coding of the offsets.
        variance_of: log variances to the variances of the coded offsets: `BoxLoss.variance_of` of the loss that the
            head was trained with.
        scale: canvas pixels per file pixel, x and y, for `plus_one_widths`; 1 if None.
    """

    image_size: Int[Array, "2"]
    box_coder: CornerBoxCoder | CenterBoxCoder
    variance_of: Callable[[Array], Array] = kl_variance_of
    scale: Float[Array, "2"] | None = None


def select_candidates(
    predictions: BoxPredictions, proposals: Proposals, decoding: Decoding, settings: PostprocessSettings
) -> Candidates:
    """Returns the best pairs above the score threshold, best first; only these are decoded.

    Args:
        predictions: the box head's outputs for each proposal, Kb = K or 1.
        proposals: the boxes that the predictions refer to.
        decoding: how they become boxes.
        settings: reads `score_threshold`, `pre_nms_topk`, `plus_one_widths`, and `voting` for weighted boxes fusion,
            whose clusters take the place of the candidates they are made of.
    """
    logits = predictions.class_logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1)[:, :-1]
    eligible = proposals.valid[:, None] & (scores > settings.score_threshold)
    ranked = jnp.where(eligible, scores, -1.0).ravel()
    scores, flat_index = jax.lax.top_k(ranked, min(settings.pre_nms_topk, ranked.size))
    num_classes = predictions.class_logits.shape[-1] - 1
    proposal_index, classes = jnp.divmod(flat_index, num_classes)

    # A class-agnostic head has one row for every class.
    row = classes if predictions.box_deltas.shape[1] > 1 else jnp.zeros_like(classes)
    references, pixel = proposals.boxes[proposal_index], None
    if settings.plus_one_widths:
        references, pixel = end_at_last_pixel(references, decoding.scale)
    deltas = predictions.box_deltas[proposal_index, row].astype(jnp.float32)
    boxes = clip_to_image(decoding.box_coder.decode(deltas, references), decoding.image_size, pixel=pixel)
    valid = (scores >= 0) & is_nonempty(boxes, min_size=_MIN_SIZE)

    coded_variances = pixel_variances = None
    if predictions.box_log_vars is not None:
        coded_variances = decoding.variance_of(predictions.box_log_vars[proposal_index, row])
        pixel_stds = decoding.box_coder.decode_stds(jnp.sqrt(coded_variances), references)
        pixel_variances = jnp.square(pixel_stds)
    candidates = Candidates(
        boxes=boxes,
        scores=scores,
        classes=classes,
        valid=valid,
        coded_variances=coded_variances,
        pixel_variances=pixel_variances,
        proposal_index=proposal_index,
    )
    return _fuse(candidates, settings) if settings.voting == "wbf" else candidates


def _fuse(candidates: Candidates, settings: PostprocessSettings) -> Candidates:
    clusters = weighted_boxes_fusion(
        candidates.boxes,
        candidates.scores,
        candidates.classes,
        candidates.valid,
        iou_threshold=settings.wbf_threshold,
        reported_variances=candidates.pixel_variances,
        variance_mode=settings.voting_variance,
    )
    return Candidates(
        boxes=clusters.boxes,
        scores=clusters.scores,
        classes=clusters.classes,
        valid=clusters.valid,
        pixel_variances=clusters.variances,
        proposal_index=candidates.proposal_index[clusters.indices],
    )
