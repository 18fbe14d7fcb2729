"""Region proposal network (Ren et al., NeurIPS 2015, section 3.1): boxes that may contain an object."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from klbox_jax.losses.box_regression import smooth_l1
from klbox_jax.losses.detection import objectness_loss
from klbox_jax.losses.reduction import masked_sum
from klbox_jax.models.convolution import Conv
from klbox_jax.ops.anchors import AnchorGenerator
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import clip_to_image, is_nonempty
from klbox_jax.ops.matcher import MatchResult, match_boxes
from klbox_jax.ops.nms import suppress_sorted
from klbox_jax.ops.sampling import Samples, subsample_labels
from klbox_jax.structures import GroundTruth, Proposals


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposalSettings:
    """Selection of proposals from the anchors of an image.

    Attributes:
        pre_nms_topk: number of anchors of each level that enter NMS.
        post_nms_topk: number of proposals of an image.
        nms_threshold: a proposal is removed if its IoU with a better one of its level is above this.
        min_size: both sides of a proposal must be longer than this, in pixels of the canvas (`RPN_MIN_SIZE` of
            py-faster-rcnn, which is in pixels of the file).
        plus_one_widths: for weights of Detectron, whose boxes are whole pixels: a proposal outside the image becomes
            its nearest pixel instead of being removed. See `PostprocessSettings`.
    """

    pre_nms_topk: int = 2000
    post_nms_topk: int = 1000
    nms_threshold: float = 0.7
    min_size: float = 0.0
    plus_one_widths: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorSampling:
    """Labels and number of the anchors that train the RPN.

    Attributes:
        iou_thresholds: an anchor is background if its IoU is below the first value and an object if it is at least the
            second one. The best anchors of each object are objects too.
        batch_size_per_image: number of anchors drawn from each image.
        positive_fraction: largest share of objects among them.
    """

    iou_thresholds: tuple[float, float] = (0.3, 0.7)
    batch_size_per_image: int = 256
    positive_fraction: float = 0.5


@flax.struct.dataclass
class RPNOutputs:
    """Outputs of the head for each anchor: one array for each level, finest first, with rows and columns flattened.

    Attributes:
        objectness_logits: `[b, h * w * a]` for each level.
        anchor_deltas: `[b, h * w * a, 4]` for each level.
        anchors: `[h * w * a, 4]` for each level, in pixels of the canvas.
    """

    objectness_logits: tuple[Float[Array, "b _n"], ...]
    anchor_deltas: tuple[Float[Array, "b _n 4"], ...]
    anchors: tuple[Float[Array, "_n 4"], ...]


class RPNHead(nn.Module):
    """A 3x3 convolution and two 1x1 convolutions, shared by all levels.

    Attributes:
        features: channels of the 3x3 convolution.
        num_anchors: number of anchors at each cell.
        dtype: dtype of the 3x3 convolution; None is that of input and params together. The 1x1 convolutions
            are float32: with this many anchors, many bfloat16 scores would tie.
    """

    features: int
    num_anchors: int
    dtype: DTypeLike | None = None

    def setup(self):
        normal = nn.initializers.normal(0.01)
        self.conv = Conv(self.features, kernel_size=3, kernel_init=normal, dtype=self.dtype)
        last = functools.partial(Conv, kernel_size=1, kernel_init=normal, dtype=jnp.float32)
        self.objectness_logits = last(self.num_anchors)
        self.anchor_deltas = last(self.num_anchors * 4)

    def __call__(
        self, features: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n 4"]]:
        """Returns the logits and the deltas of one level."""
        hidden = nn.relu(self.conv(features))
        b = features.shape[0]
        return self.objectness_logits(hidden).reshape(b, -1), self.anchor_deltas(hidden).reshape(b, -1, 4)


class RPN(nn.Module):
    """Region proposal network: the head, its anchors, its proposals and its losses.

    Attributes:
        features: channels of the head.
        levels: pyramid levels that the head reads, finest first; level `l` has stride `2 ** l`.
        anchor_generator: anchors of these levels.
        box_coder: offsets between an anchor and its box.
        train_proposals, eval_proposals: selection of the proposals in training and in evaluation.
        sampling: labels and number of the anchors in training.
        smooth_l1_beta: error at which the box loss changes from quadratic to linear, in coded units.
        dtype: dtype of the head's 3x3 convolution; logits, boxes and losses are float32.
    """

    features: int
    levels: tuple[int, ...]
    anchor_generator: AnchorGenerator
    box_coder: CornerBoxCoder | CenterBoxCoder = CenterBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    train_proposals: ProposalSettings = ProposalSettings()
    eval_proposals: ProposalSettings = ProposalSettings(pre_nms_topk=1000)
    sampling: AnchorSampling = AnchorSampling()
    smooth_l1_beta: float = 1.0 / 9.0
    dtype: DTypeLike | None = None

    def setup(self):
        self.head = RPNHead(self.features, self.anchor_generator.num_anchors_per_cell, self.dtype)

    def __call__(self, pyramid: dict[str, Float[Array, "b _h _w c"]], canvas: tuple[int, int]) -> RPNOutputs:
        """Runs the head on every level; `canvas` is the height and width of the padded images."""
        logits, deltas = zip(*(self.head(pyramid[f"p{level}"]) for level in self.levels), strict=True)
        anchors = tuple(jnp.asarray(grid) for grid in self.anchor_generator.grid(canvas))
        return RPNOutputs(objectness_logits=logits, anchor_deltas=deltas, anchors=anchors)

    def predict_proposals(
        self, outputs: RPNOutputs, image_size: Int[Array, "b 2"], *, train: bool
    ) -> Proposals:
        """Returns the proposals of each image, without a gradient; see `generate_proposals`."""
        settings = self.train_proposals if train else self.eval_proposals

        def propose(logits, deltas, size):
            return generate_proposals(
                logits, deltas, outputs.anchors, size, box_coder=self.box_coder, settings=settings
            )

        outputs = jax.lax.stop_gradient(outputs)
        return jax.vmap(propose)(outputs.objectness_logits, outputs.anchor_deltas, image_size)

    def losses(
        self, outputs: RPNOutputs, gt: GroundTruth, image_valid: Bool[Array, " b"], keys: Key[Array, " b"]
    ) -> dict[str, Array]:
        """Returns `loss_rpn_cls` and `loss_rpn_loc`, sums over `batch_size_per_image` times the valid images."""
        anchors = jnp.concatenate(outputs.anchors)

        def losses_of_image(logits, deltas, gt, key):
            match, samples = label_and_sample_anchors(anchors, gt, key, sampling=self.sampling)
            sampled_logits = logits[samples.indices]
            cls = objectness_loss(sampled_logits, samples.is_positive.astype(jnp.float32))
            references = anchors[samples.indices]
            # A background sample has no box. Its anchor is the target, so that its masked loss is finite.
            boxes = jnp.where(
                samples.is_positive[:, None], gt.boxes[match.gt_index[samples.indices]], references
            )
            targets = self.box_coder.encode(boxes, references)
            loc = smooth_l1(deltas[samples.indices], targets, beta=self.smooth_l1_beta).sum(axis=-1)
            return cls, loc, samples

        logits = jnp.concatenate(outputs.objectness_logits, axis=1)
        deltas = jnp.concatenate(outputs.anchor_deltas, axis=1)
        cls, loc, samples = jax.vmap(losses_of_image)(logits, deltas, gt, keys)
        valid = samples.valid & image_valid[:, None]
        normalizer = self.sampling.batch_size_per_image * jnp.maximum(image_valid.sum(), 1)
        return {
            "loss_rpn_cls": masked_sum(cls, valid) / normalizer,
            "loss_rpn_loc": masked_sum(loc, valid & samples.is_positive) / normalizer,
        }


def label_and_sample_anchors(
    anchors: Float[Array, "a 4"], gt: GroundTruth, key: Key[Array, ""], *, sampling: AnchorSampling
) -> tuple[MatchResult, Samples]:
    """Matches one image's anchors to its objects and draws the anchors that train the RPN."""
    match = match_boxes(anchors, gt, thresholds=sampling.iou_thresholds, allow_low_quality_matches=True)
    samples = subsample_labels(
        key,
        match.labels,
        num_samples=sampling.batch_size_per_image,
        positive_fraction=sampling.positive_fraction,
    )
    return match, samples


def generate_proposals(
    objectness_logits: tuple[Float[Array, " _n"], ...],
    anchor_deltas: tuple[Float[Array, "_n 4"], ...],
    anchors: tuple[Float[Array, "_n 4"], ...],
    image_size: Int[Array, " 2"],
    *,
    box_coder: CornerBoxCoder | CenterBoxCoder,
    settings: ProposalSettings,
) -> Proposals:
    """Selects one image's proposals from its anchors (detectron2's `find_top_rpn_proposals`, with fixed shapes).

    On each level: take the anchors with the best scores, decode and clip their boxes, drop small boxes, run NMS. Then
    take the boxes with the best scores of all levels.

    Args:
        objectness_logits: scores of the anchors, one array for each level.
        anchor_deltas: coded boxes of the anchors, one array for each level.
        anchors: anchors in pixels of the canvas, one array for each level.
        image_size: height and width in pixels.
        box_coder: offsets between an anchor and its box.
        settings: numbers and thresholds of the selection.

    Returns:
        `Proposals` with `post_nms_topk` slots, or one for each box that enters NMS if these are fewer.
    """
    clip = _clip_function(settings)
    level_boxes, level_logits, level_valid = [], [], []
    for logits, deltas, level_anchors in zip(objectness_logits, anchor_deltas, anchors, strict=True):
        top_logits, top = jax.lax.top_k(logits, min(settings.pre_nms_topk, logits.shape[0]))
        boxes = clip(box_coder.decode(deltas[top], level_anchors[top]), image_size)
        # The boxes are sorted. The survivors need no order, because the best of all levels are chosen below.
        large = is_nonempty(boxes, min_size=settings.min_size)
        kept = suppress_sorted(boxes, large, iou_threshold=settings.nms_threshold)
        level_boxes.append(boxes)
        level_logits.append(top_logits)
        level_valid.append(kept)
    boxes, logits, valid = map(jnp.concatenate, (level_boxes, level_logits, level_valid))
    _, best = jax.lax.top_k(jnp.where(valid, logits, -jnp.inf), min(settings.post_nms_topk, valid.shape[0]))
    return Proposals(boxes=boxes[best], objectness_logits=logits[best], valid=valid[best])


def _clip_function(settings: ProposalSettings) -> Callable[[Array, Array], Array]:
    """Returns `clip_to_image`, with `plus_one_widths` the form that leaves a pixel of a box outside the image."""
    return functools.partial(clip_to_image, pixel=jnp.ones(2)) if settings.plus_one_widths else clip_to_image
