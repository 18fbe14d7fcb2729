"""From the raw outputs of the heads to detections: select, suppress, vote, refine."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.losses.box_regression import kl_variance_of
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import clip_to_image, is_nonempty
from klbox_jax.postprocess.candidate_selection import Decoding, select_candidates
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.greedy_suppression import SuppressionResult
from klbox_jax.postprocess.refinement import refine_boxes
from klbox_jax.postprocess.released_code import remaining_voters
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.postprocess.suppression import suppress
from klbox_jax.postprocess.voting import KeptBoxes, VotingResult, average
from klbox_jax.structures import Batch, BoxPredictions, Detections, Proposals


def detect(
    predictions: BoxPredictions,
    proposals: Proposals,
    image_size: Int[Array, "2"],
    *,
    settings: PostprocessSettings,
    box_coder: CornerBoxCoder | CenterBoxCoder,
    variance_of: Callable[[Array], Array] = kl_variance_of,
    predict_iou: Callable[[Array, Array], Array] | None = None,
    scale: Float[Array, "2"] | None = None,
) -> Detections:
    """Turns the heads' outputs for one image into detections; `jax.vmap` for a batch.

    Softmax; the `pre_nms_topk` best (proposal, class) pairs above the score threshold; decode those and clip them to
    the image, dropping empty boxes; suppress; vote; refine.

    Voters are all candidates of the class, including those that suppression removed, unless `settings.voters` says
    otherwise. Variance voting weighs them by the variance of the coded offset, as in the paper. Weighted boxes fusion
    makes its own clusters, and suppression runs over these. `box_stds` is in pixels of the canvas: without voting the
    detection's own, with voting as `settings.voting_variance` says; refinement leaves it as it is.

    Args:
        predictions: the box head's outputs for each proposal, Kb = K or 1.
        proposals: the boxes that the predictions refer to, P of them.
        image_size: true height and width inside the canvas.
        settings: static.
        box_coder: the coding of the offsets.
        variance_of: meaning of the head's log variances: `BoxLoss.variance_of` of the loss it was trained with.
        predict_iou: the IoU head: boxes `[n, 4]` and classes `[n]` to predicted IoUs `[n]`, or None.
        scale: canvas pixels per file pixel, x and y, for `settings.plus_one_widths`; 1 if None.

    Returns:
        `settings.detections_per_image` slots, best first. Unused ones hold zeros.

    Raises:
        ValueError: if the settings need what the heads do not predict, or variances come with a coder that
            cannot turn them into pixels.
    """
    _check(predictions, settings, box_coder, predict_iou)
    decoding = Decoding(image_size=image_size, box_coder=box_coder, variance_of=variance_of, scale=scale)
    candidates = select_candidates(predictions, proposals, decoding, settings)
    if settings.suppression == "iou_guided":
        ious = predict_iou(candidates.boxes, candidates.classes)
        candidates = candidates.replace(predicted_ious=ious)
    kept = suppress(candidates, settings)
    voted = vote(kept, candidates, settings)
    boxes, scores, classes = voted.boxes, kept.scores, candidates.classes[kept.indices]
    if settings.refine_steps:
        boxes = _refine(boxes, lambda boxes: predict_iou(boxes, classes), image_size, settings)
    ious = None if predict_iou is None else jnp.clip(predict_iou(boxes, classes), 0.0, 1.0)
    if settings.score_by_iou:
        scores = scores * ious

    rows = kept.valid[:, None]
    box_stds = None
    if voted.variances is not None:
        # The root of 0 has no finite gradient.
        box_stds = jnp.where(rows, jnp.sqrt(jnp.where(rows, voted.variances, 1.0)), 0.0)
    if settings.score_by_std:
        scores = weigh_by_std(scores, boxes, box_stds, strength=settings.score_by_std)
    found = Detections(
        boxes=jnp.where(rows, boxes, 0.0),
        scores=jnp.where(kept.valid, scores, 0.0),
        classes=jnp.where(kept.valid, classes, 0),
        candidate_index=jnp.where(kept.valid, candidates.proposal_index[kept.indices], 0),
        valid=kept.valid,
        box_stds=box_stds,
        predicted_ious=None if ious is None else jnp.where(kept.valid, ious, 0.0),
    )
    return _best_first(found) if settings.score_by_iou or settings.score_by_std else found


def _check(predictions, settings, box_coder, predict_iou) -> None:
    has_variances = predictions.box_log_vars is not None
    settings.check_head(has_variances=has_variances, has_iou_head=predict_iou is not None)
    if has_variances and not isinstance(box_coder, CornerBoxCoder):
        raise ValueError(
            f"Variances of edges need the corner coding, got {type(box_coder).__name__}; use CornerBoxCoder."
        )


def vote(kept: SuppressionResult, candidates: Candidates, settings: PostprocessSettings) -> VotingResult:
    """Returns the kept boxes, averaged with their neighbours by `settings.voting`.

    Args:
        kept: rows of the candidates.
        candidates: the voters; those of weighted boxes fusion are averages already.
        settings: `voting` and the fields of the method.

    Returns:
        Boxes in pixels and variances in squared pixels, None for a head without variances.
    """
    boxes, classes = candidates.boxes[kept.indices], candidates.classes[kept.indices]
    variances = None
    if candidates.pixel_variances is not None:
        variances = candidates.pixel_variances[kept.indices]
    method = settings.voting_method
    if method is None:
        return VotingResult(boxes=boxes, variances=variances)
    voters = remaining_voters(kept) if settings.voters == "remaining" else None
    before = KeptBoxes(boxes=boxes, classes=classes, variances=variances, voters=voters)
    votes = method(before, candidates)
    return average(before, candidates, votes, variance_mode=settings.variance_mode)


def _refine(boxes, predict_iou, image_size, settings: PostprocessSettings) -> Float[Array, "D 4"]:
    refined = refine_boxes(
        boxes,
        predict_iou,
        num_steps=settings.refine_steps,
        step_size=settings.refine_step_size,
        keep_best=settings.refine_keep_best,
    )
    refined = clip_to_image(refined.boxes, image_size)
    # A long step may turn a box inside out; it then stays where it was.
    return jnp.where(is_nonempty(refined)[:, None], refined, boxes)


def weigh_by_std(
    scores: Float[Array, " D"],
    boxes: Float[Array, "D 4"],
    box_stds: Float[Array, "D 4"],
    *,
    strength: float,
) -> Float[Array, " D"]:
    """Returns score * exp(-strength * mean over the four edges of std / side), so that the score covers localization.

    To first order an edge that is off by d pixels takes d / side from the IoU, so the expected IoU falls about linearly
    in std / side; see `PostprocessSettings.score_by_std`.

    Args:
        scores: of detections.
        boxes: their edges, in any unit; the side is the extent across the edge, at least 1 of that unit.
        box_stds: standard deviation of each edge, in the same unit.
        strength: 0 leaves the scores.
    """
    sides = jnp.tile(jnp.maximum(boxes[:, 2:] - boxes[:, :2], 1.0), 2)
    return scores * jnp.exp(-strength * jnp.mean(box_stds / sides, axis=1))


def _best_first(found: Detections) -> Detections:
    order = jnp.argsort(jnp.where(found.valid, -found.scores, jnp.inf), stable=True)
    return jax.tree.map(lambda rows: rows[order], found)


def unscale(detections: Detections, batch: Batch) -> Detections:
    """Moves boxes and standard deviations from the canvas to the pixels of the file, both at once.

    Args:
        detections: batched, in the canvas.
        batch: the batch they were made from, for the scale and the size of each image.

    Returns:
        The same detections; boxes clipped to the file's size, which is the canvas size over the scale.
    """
    # A padding image may have scale 0.
    scale = jnp.where(batch.scale > 0, batch.scale, 1.0)
    file_size = jnp.round(batch.image_size[..., ::-1] / scale)  # width, height
    scale, limit = jnp.tile(scale, 2)[..., None, :], jnp.tile(file_size, 2)[..., None, :]
    boxes = jnp.clip(detections.boxes / scale, 0.0, limit)
    box_stds = None if detections.box_stds is None else detections.box_stds / scale
    return detections.replace(boxes=boxes, box_stds=box_stds)
