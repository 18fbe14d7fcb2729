"""From the raw outputs of the heads to detections: select, suppress, vote, refine."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.losses.box_regression import kl_variance_of
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import clip_to_image, is_nonempty
from klbox_jax.postprocess.candidates import Candidates, fuse_candidates, select_candidates
from klbox_jax.postprocess.fusion import bayes_fusion
from klbox_jax.postprocess.refinement import refine_boxes
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.postprocess.suppression import suppress
from klbox_jax.postprocess.voting import (
    VotingResult,
    box_voting,
    iou_voting,
    variance_voting,
)
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

    Softmax; the `pre_nms_topk` best (proposal, class) pairs above the score threshold; decode those and clip
    them to the image, dropping what is left empty; suppress; vote; refine.

    Voters are all candidates of the class, those that suppression removed included, unless `settings.voters`
    says otherwise. Variance voting weighs them by the variance of the coded offset, as in the paper. Weighted
    boxes fusion makes its own clusters, and the suppression runs over these. `box_stds` is in pixels of the
    canvas: without voting the detection's own, with voting what `settings.voting_variance` says; refinement
    leaves it as it is.

    Args:
        predictions: the box head's outputs for each proposal, Kb = K or 1.
        proposals: the boxes that the predictions refer to, P of them.
        image_size: true height and width inside the canvas.
        settings: what to do, static.
        box_coder: how the offsets are coded.
        variance_of: what the head's log variances mean: `BoxLoss.variance_of` of the loss it was trained with.
        predict_iou: the IoU head: boxes `[n, 4]` and classes `[n]` to predicted IoUs `[n]`, or None.
        scale: canvas pixels per file pixel, x and y, for `settings.plus_one_widths`; 1 if None.

    Returns:
        `settings.detections_per_image` slots, best first. Unused ones hold zeros.

    Raises:
        ValueError: if the settings need what the heads do not predict, or variances come with a coder that
            cannot turn them into pixels.
    """
    has_variances = predictions.box_log_vars is not None
    settings.check_head(has_variances=has_variances, has_iou_head=predict_iou is not None)
    if has_variances and not isinstance(box_coder, CornerBoxCoder):
        raise ValueError(
            f"Variances of edges need the corner coding, got {type(box_coder).__name__}; use CornerBoxCoder."
        )

    candidates = select_candidates(
        predictions,
        proposals,
        image_size,
        settings=settings,
        box_coder=box_coder,
        variance_of=variance_of,
        scale=scale,
    )
    if settings.voting == "wbf":
        candidates = fuse_candidates(candidates, settings=settings)
    kept = suppress(
        candidates.boxes,
        candidates.scores,
        candidates.classes,
        candidates.valid,
        method=settings.suppression,
        nms_threshold=settings.nms_threshold,
        soft_nms_sigma=settings.soft_nms_sigma,
        soft_nms_threshold=settings.soft_nms_threshold,
        min_score=settings.soft_nms_min_score,
        max_outputs=settings.detections_per_image,
        predicted_ious=(
            predict_iou(candidates.boxes, candidates.classes)
            if settings.suppression == "iou_guided"
            else None
        ),
    )
    voted = vote(kept.indices, candidates, settings=settings, turns=kept.turns)
    boxes, scores, classes = voted.boxes, kept.scores, candidates.classes[kept.indices]
    if settings.refine_steps:
        refined = refine_boxes(
            boxes,
            lambda boxes: predict_iou(boxes, classes),
            num_steps=settings.refine_steps,
            step_size=settings.refine_step_size,
            keep_best=settings.refine_keep_best,
        )
        refined = clip_to_image(refined.boxes, image_size)
        # A long step may turn a box inside out; it then stays where it was.
        boxes = jnp.where(is_nonempty(refined)[:, None], refined, boxes)
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


def vote(
    kept: Int[Array, " D"],
    candidates: Candidates,
    *,
    settings: PostprocessSettings,
    turns: Int[Array, " N"] | None = None,
) -> VotingResult:
    """Returns the boxes of the kept candidates, averaged with their neighbours as the settings say.

    Args:
        kept: rows of the candidates.
        candidates: the voters; those of weighted boxes fusion are averages already.
        settings: `voting`, and the fields that belong to it.
        turns: of `SuppressionResult`; `voters='remaining'` needs them.

    Returns:
        Boxes in pixels and variances in squared pixels, None for a head without variances.
    """
    boxes, classes = candidates.boxes[kept], candidates.classes[kept]
    variances = None if candidates.pixel_variances is None else candidates.pixel_variances[kept]
    if settings.voting in ("none", "wbf"):
        return VotingResult(boxes=boxes, variances=variances)
    everyone = {"candidate_classes": candidates.classes, "candidate_valid": candidates.valid}
    if settings.voting == "bayes":
        return bayes_fusion(
            boxes,
            classes,
            candidates.boxes,
            candidates.pixel_variances,
            **everyone,
            affinity=settings.bayes_affinity,
            calibration=settings.bayes_calibration,
        )
    everyone |= {
        "reported_variances": candidates.pixel_variances,
        "kept_variances": variances,
        "variance_mode": settings.voting_variance,
    }
    if settings.voters == "remaining":
        everyone["voters"] = jnp.arange(len(kept))[:, None] < turns[None, :]
    if settings.voting == "box_voting":
        threshold = settings.box_voting_threshold
        return box_voting(
            boxes, classes, candidates.boxes, candidates.scores, **everyone, iou_threshold=threshold
        )
    everyone |= {"sigma_t": settings.sigma_t, "iou_floor": settings.voting_iou_floor}
    if settings.voting.endswith("_score"):
        everyone["candidate_scores"] = candidates.scores
    if settings.voting in ("iou", "iou_score"):
        return iou_voting(boxes, classes, candidates.boxes, **everyone)
    weigh = candidates.coded_variances
    if settings.variance_order == "detectron":
        x1, y1, x2, y2 = weigh.T
        weigh = jnp.stack([x1, x2, y1, y2], axis=-1)
    return variance_voting(boxes, classes, candidates.boxes, weigh, **everyone)


def weigh_by_std(
    scores: Float[Array, " D"],
    boxes: Float[Array, "D 4"],
    box_stds: Float[Array, "D 4"],
    *,
    strength: float,
) -> Float[Array, " D"]:
    """Returns score * exp(-strength * mean over the four edges of std / side), a score of localization too.

    To first order an edge that is off by d pixels takes d / side from the IoU, so that the expected IoU falls about
    linearly in std / side; see `PostprocessSettings.score_by_std`.

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
