"""From the raw outputs of the box head to detections: decode, suppress, vote."""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.losses.box_regression import kl_variance_of
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import clip_to_image, is_nonempty
from klbox_jax.postprocess.suppression import SUPPRESSION_METHODS, suppress
from klbox_jax.postprocess.voting import variance_voting
from klbox_jax.structures import Batch, BoxPredictions, Detections, Proposals

VOTING_METHODS = ("none", "variance")
# Sides in pixels. A thinner box is as good as empty: it has no IoU to speak of, not even with itself.
_MIN_SIZE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostprocessSettings:
    """How detections are made from predictions; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        suppression: `hard`, `soft_linear` or `soft_gaussian`.
        voting: `none`, or `variance` for a head that predicts variances.
        sigma_t: width of the IoU weight in variance voting.
        nms_threshold: IoU above which `hard` removes a box.
        soft_nms_sigma: width of the decay of `soft_gaussian`.
        soft_nms_threshold: IoU from which `soft_linear` decays.
        score_threshold: a candidate has a class probability above this.
        soft_nms_min_score: the soft methods drop a box whose score falls below this.
        pre_nms_topk: candidates of an image, over all classes, before suppression.
        detections_per_image: slots of the result.

    Raises:
        ValueError: naming the field and what it may be.
    """

    suppression: str = "hard"
    voting: str = "none"
    sigma_t: float = 0.02
    nms_threshold: float = 0.5
    soft_nms_sigma: float = 0.5
    soft_nms_threshold: float = 0.3
    score_threshold: float = 0.05
    soft_nms_min_score: float = 0.001
    pre_nms_topk: int = 1000
    detections_per_image: int = 100

    def __post_init__(self):
        for name, choices in (("suppression", SUPPRESSION_METHODS), ("voting", VOTING_METHODS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        for name in ("nms_threshold", "soft_nms_threshold", "score_threshold", "soft_nms_min_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)!r}.")
        for name in ("sigma_t", "soft_nms_sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)!r}.")
        for name in ("pre_nms_topk", "detections_per_image"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive integer; got {getattr(self, name)!r}.")


@flax.struct.dataclass
class _Candidates:
    """Decoded (proposal, class) pairs, best first. Variances are None for a head without them."""

    boxes: Float[Array, "N 4"]
    scores: Float[Array, " N"]
    classes: Int[Array, " N"]
    proposal_index: Int[Array, " N"]
    valid: Bool[Array, " N"]
    coded_variances: Float[Array, "N 4"] | None
    pixel_variances: Float[Array, "N 4"] | None


def detect(
    predictions: BoxPredictions,
    proposals: Proposals,
    image_size: Int[Array, "2"],
    *,
    settings: PostprocessSettings,
    box_coder: CornerBoxCoder | CenterBoxCoder,
    log_var_clamp: tuple[float, float] = (-7.0, 7.0),
) -> Detections:
    """Turns the box head's outputs for one image into detections; `jax.vmap` for a batch.

    Softmax; the `pre_nms_topk` best (proposal, class) pairs above the score threshold; decode those and clip
    them to the image, dropping what is left empty; suppress; vote.

    Voters are all candidates of the class, those that suppression removed included, and they are weighed by
    the variance of the coded offset, as in the paper. `box_stds` is in pixels of the canvas: without voting
    the detection's own, with voting the root of the voters' average variance under the voting weights.

    Args:
        predictions: the box head's outputs for each proposal, Kb = K or 1.
        proposals: the boxes that the predictions refer to, P of them.
        image_size: true height and width inside the canvas.
        settings: what to do, static.
        box_coder: how the offsets are coded.
        log_var_clamp: range of the log-variances, that of the loss.

    Returns:
        `settings.detections_per_image` slots, best first. Unused ones hold zeros.

    Raises:
        ValueError: if voting needs variances that the head does not predict, or variances come with a coder
            that cannot turn them into pixels.
    """
    has_variances = predictions.box_log_vars is not None
    if settings.voting == "variance" and not has_variances:
        raise ValueError(
            "voting='variance' needs box_log_vars, which this head does not predict; "
            "train it with a loss that has variances (such as kl), or set voting='none'."
        )
    if has_variances and not isinstance(box_coder, CornerBoxCoder):
        raise ValueError(
            f"Variances of edges need the corner coding, got {type(box_coder).__name__}; use CornerBoxCoder."
        )

    candidates = _candidates(
        predictions,
        proposals,
        image_size,
        settings=settings,
        box_coder=box_coder,
        log_var_clamp=log_var_clamp,
    )
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
    )
    boxes, classes = candidates.boxes[kept.indices], candidates.classes[kept.indices]
    variances = candidates.pixel_variances[kept.indices] if has_variances else None
    if settings.voting == "variance":
        voted = variance_voting(
            boxes,
            classes,
            candidates.boxes,
            candidates.coded_variances,
            candidates.classes,
            candidates.valid,
            sigma_t=settings.sigma_t,
            reported_variances=candidates.pixel_variances,
        )
        boxes, variances = voted.boxes, voted.variances

    rows = kept.valid[:, None]
    return Detections(
        boxes=jnp.where(rows, boxes, 0.0),
        scores=kept.scores,
        classes=jnp.where(kept.valid, classes, 0),
        candidate_index=jnp.where(kept.valid, candidates.proposal_index[kept.indices], 0),
        valid=kept.valid,
        box_stds=None if variances is None else jnp.where(rows, jnp.sqrt(variances), 0.0),
    )


def _candidates(
    predictions: BoxPredictions,
    proposals: Proposals,
    image_size: Int[Array, "2"],
    *,
    settings: PostprocessSettings,
    box_coder: CornerBoxCoder | CenterBoxCoder,
    log_var_clamp: tuple[float, float],
) -> _Candidates:
    """The best (proposal, class) pairs; only these are decoded."""
    logits = predictions.class_logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1)[:, :-1]
    eligible = proposals.valid[:, None] & (scores > settings.score_threshold)
    ranked = jnp.where(eligible, scores, -1.0).ravel()
    scores, flat_index = jax.lax.top_k(ranked, min(settings.pre_nms_topk, ranked.size))
    num_classes = predictions.class_logits.shape[-1] - 1
    proposal_index, classes = jnp.divmod(flat_index, num_classes)

    # A class-agnostic head has one row for every class.
    row = classes if predictions.box_deltas.shape[1] > 1 else jnp.zeros_like(classes)
    references = proposals.boxes[proposal_index]
    deltas = predictions.box_deltas[proposal_index, row].astype(jnp.float32)
    boxes = clip_to_image(box_coder.decode(deltas, references), image_size)
    valid = (scores >= 0) & is_nonempty(boxes, min_size=_MIN_SIZE)

    coded_variances = pixel_variances = None
    if predictions.box_log_vars is not None:
        coded_variances = kl_variance_of(predictions.box_log_vars[proposal_index, row], clamp=log_var_clamp)
        pixel_variances = jnp.square(box_coder.decode_stds(jnp.sqrt(coded_variances), references))
    return _Candidates(
        boxes=boxes,
        scores=scores,
        classes=classes,
        proposal_index=proposal_index,
        valid=valid,
        coded_variances=coded_variances,
        pixel_variances=pixel_variances,
    )


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
