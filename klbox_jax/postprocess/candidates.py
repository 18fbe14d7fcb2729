"""The (proposal, class) pairs that may become detections."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import clip_to_image, is_nonempty
from klbox_jax.postprocess.fusion import weighted_boxes_fusion
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import BoxPredictions, Proposals

# Sides in pixels. A thinner box is as good as empty: it has no IoU to speak of, not even with itself.
_MIN_SIZE = 1e-3


@flax.struct.dataclass
class Candidates:
    """Decoded boxes of an image, over all classes.

    Attributes:
        boxes: in pixels of the canvas.
        scores: class probability.
        classes: dense class index.
        proposal_index: the proposal that each was made from.
        valid: False for an unused slot.
        coded_variances: variance of each edge's coded offset, or None for a head without variances.
        pixel_variances: the same in squared pixels, or None.
    """

    boxes: Float[Array, "N 4"]
    scores: Float[Array, " N"]
    classes: Int[Array, " N"]
    proposal_index: Int[Array, " N"]
    valid: Bool[Array, " N"]
    coded_variances: Float[Array, "N 4"] | None
    pixel_variances: Float[Array, "N 4"] | None


def select_candidates(
    predictions: BoxPredictions,
    proposals: Proposals,
    image_size: Int[Array, "2"],
    *,
    settings: PostprocessSettings,
    box_coder: CornerBoxCoder | CenterBoxCoder,
    variance_of: Callable[[Array], Array],
    scale: Float[Array, "2"] | None = None,
) -> Candidates:
    """Returns the best pairs above the score threshold, best first; only these are decoded.

    Args:
        predictions: the box head's outputs for each proposal.
        proposals: the boxes that the predictions refer to.
        image_size: true height and width; boxes are clipped to it.
        settings: `score_threshold`, `pre_nms_topk` and `plus_one_widths` matter.
        box_coder: how the offsets are coded.
        variance_of: log variances to the variances of the coded offsets.
        scale: canvas pixels per file pixel, x and y, for `plus_one_widths`; 1 if None.
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
        # Detectron scales the first and the last pixel to the file, and decodes there: the last one is the file's.
        pixel = jnp.ones(2) if scale is None else scale
        references = references + jnp.concatenate([jnp.zeros(2), pixel - 1.0])[None, :]
    deltas = predictions.box_deltas[proposal_index, row].astype(jnp.float32)
    boxes = clip_to_image(box_coder.decode(deltas, references), image_size, pixel=pixel)
    valid = (scores >= 0) & is_nonempty(boxes, min_size=_MIN_SIZE)

    coded_variances = pixel_variances = None
    if predictions.box_log_vars is not None:
        coded_variances = variance_of(predictions.box_log_vars[proposal_index, row])
        pixel_variances = jnp.square(box_coder.decode_stds(jnp.sqrt(coded_variances), references))
    return Candidates(
        boxes=boxes,
        scores=scores,
        classes=classes,
        proposal_index=proposal_index,
        valid=valid,
        coded_variances=coded_variances,
        pixel_variances=pixel_variances,
    )


def fuse_candidates(candidates: Candidates, *, settings: PostprocessSettings) -> Candidates:
    """Returns the clusters of weighted boxes fusion in place of the candidates they are made of."""
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
        proposal_index=candidates.proposal_index[clusters.indices],
        valid=clusters.valid,
        coded_variances=None,
        pixel_variances=clusters.variances,
    )
