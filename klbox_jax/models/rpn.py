"""Region proposal network: which places of the image may hold an object.

Ren et al., NeurIPS 2015, section 3.1.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from klbox_jax.losses.box_regression import smooth_l1
from klbox_jax.losses.detection import objectness_loss
from klbox_jax.losses.reduction import masked_sum
from klbox_jax.models.convolution import Conv
from klbox_jax.ops.anchors import AnchorGenerator
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import clip_to_image, is_nonempty
from klbox_jax.ops.matcher import match_boxes
from klbox_jax.ops.nms import suppress_sorted
from klbox_jax.ops.sampling import subsample_labels
from klbox_jax.structures import GroundTruth, Proposals


@flax.struct.dataclass
class RPNOutputs:
    """What the head says of each anchor of each level, rows and columns flattened, the levels finest first.

    Attributes:
        objectness_logits: one array `[b, h * w * a]` a level.
        anchor_deltas: one array `[b, h * w * a, 4]` a level.
        anchors: one array `[h * w * a, 4]` a level.
    """

    objectness_logits: tuple[Float[Array, "b _n"], ...]
    anchor_deltas: tuple[Float[Array, "b _n 4"], ...]
    anchors: tuple[Float[Array, "_n 4"], ...]


class RPNHead(nn.Module):
    """A 3x3 convolution and two 1x1 convolutions, shared by all levels.

    Attributes:
        features: channels of the 3x3 convolution.
        num_anchors: anchors in each cell.
        dtype: dtype of the 3x3 convolution; None is that of input and params together. The 1x1 convolutions
            are float32: among so many anchors, bfloat16 scores would be full of ties.
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
    """The head, its anchors, its proposals and its losses.

    Attributes:
        features: channels of the head.
        levels: pyramid levels it looks at, finest first.
        anchor_sizes: for each level, the side of a square anchor in pixels; several make several anchors.
        aspect_ratios: height over width.
        anchor_offset: where an anchor stands in its cell, in cells; 0 for weights of torchvision or detectron2.
        round_anchors: round half of each anchor's sides to whole pixels, as torchvision does.
        box_coder: offsets between an anchor and its box; by edges in the KL-Loss release.
        min_size: side in pixels of the canvas that a proposal has to exceed (`RPN_MIN_SIZE` of py-faster-rcnn,
            which is in pixels of the file).
        pre_nms_topk: candidates kept in each level before NMS, in training and in evaluation.
        post_nms_topk: proposals kept in an image, in training and in evaluation.
        nms_threshold: IoU above which the weaker of two proposals of one level goes.
        iou_thresholds: below the first an anchor is background, from the second on an object.
        batch_size_per_image: anchors sampled for the losses.
        positive_fraction: at most this share of them is positive.
        smooth_l1_beta: where the box loss turns from quadratic to linear, in coded units.
        dtype: dtype of the head's 3x3 convolution; logits, boxes and losses are float32.
        plus_one_widths: a proposal beside the image keeps its nearest pixel, as in Detectron; see
            `PostprocessSettings`.
    """

    features: int
    levels: tuple[int, ...]
    anchor_sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_offset: float = 0.5
    round_anchors: bool = False
    box_coder: CornerBoxCoder | CenterBoxCoder = CenterBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    min_size: float = 0.0
    pre_nms_topk: tuple[int, int] = (2000, 1000)
    post_nms_topk: tuple[int, int] = (1000, 1000)
    nms_threshold: float = 0.7
    iou_thresholds: tuple[float, float] = (0.3, 0.7)
    batch_size_per_image: int = 256
    positive_fraction: float = 0.5
    smooth_l1_beta: float = 1.0 / 9.0
    dtype: DTypeLike | None = None
    plus_one_widths: bool = False

    def setup(self):
        self.head = RPNHead(self.features, len(self.anchor_sizes[0]) * len(self.aspect_ratios), self.dtype)

    def __call__(self, pyramid: dict[str, Float[Array, "b _h _w c"]], canvas: tuple[int, int]) -> RPNOutputs:
        """Runs the head on every level; `canvas` is the height and width of the padded images."""
        generator = AnchorGenerator(
            sizes=self.anchor_sizes,
            aspect_ratios=self.aspect_ratios,
            strides=tuple(2**level for level in self.levels),
            offset=self.anchor_offset,
            round_sizes=self.round_anchors,
        )
        logits, deltas = zip(*(self.head(pyramid[f"p{level}"]) for level in self.levels), strict=True)
        anchors = tuple(jnp.asarray(grid) for grid in generator.grid(canvas))
        return RPNOutputs(objectness_logits=logits, anchor_deltas=deltas, anchors=anchors)

    def proposals(self, outputs: RPNOutputs, image_size: Int[Array, "b 2"], *, train: bool) -> Proposals:
        """Returns each image's best boxes after NMS within each level, without a gradient."""
        pre_nms_topk, post_nms_topk = (
            self.pre_nms_topk[0 if train else 1],
            self.post_nms_topk[0 if train else 1],
        )

        def single(logits, deltas, size):
            return generate_proposals(
                logits,
                deltas,
                outputs.anchors,
                size,
                box_coder=self.box_coder,
                pre_nms_topk=pre_nms_topk,
                post_nms_topk=post_nms_topk,
                nms_threshold=self.nms_threshold,
                min_size=self.min_size,
                plus_one_widths=self.plus_one_widths,
            )

        outputs = jax.lax.stop_gradient(outputs)
        return jax.vmap(single)(outputs.objectness_logits, outputs.anchor_deltas, image_size)

    def losses(
        self, outputs: RPNOutputs, gt: GroundTruth, image_valid, keys: Key[Array, " b"]
    ) -> dict[str, Array]:
        """Returns `loss_rpn_cls` and `loss_rpn_loc`, sums over `batch_size_per_image` times the valid images."""
        anchors = jnp.concatenate(outputs.anchors)

        def single(logits, deltas, gt, key):
            match = match_boxes(anchors, gt, thresholds=self.iou_thresholds, allow_low_quality_matches=True)
            samples = subsample_labels(
                key,
                match.labels,
                num_samples=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
            )
            sampled_logits = logits[samples.indices]
            cls = objectness_loss(sampled_logits, samples.is_positive.astype(jnp.float32))
            references = anchors[samples.indices]
            # A background sample has no box of its own: it gets its anchor, for a finite target, and is masked.
            boxes = jnp.where(
                samples.is_positive[:, None], gt.boxes[match.gt_index[samples.indices]], references
            )
            targets = self.box_coder.encode(boxes, references)
            loc = smooth_l1(deltas[samples.indices], targets, beta=self.smooth_l1_beta).sum(axis=-1)
            return cls, loc, samples

        logits = jnp.concatenate(outputs.objectness_logits, axis=1)
        deltas = jnp.concatenate(outputs.anchor_deltas, axis=1)
        cls, loc, samples = jax.vmap(single)(logits, deltas, gt, keys)
        valid = samples.valid & image_valid[:, None]
        normalizer = self.batch_size_per_image * jnp.maximum(image_valid.sum(), 1)
        return {
            "loss_rpn_cls": masked_sum(cls, valid) / normalizer,
            "loss_rpn_loc": masked_sum(loc, valid & samples.is_positive) / normalizer,
        }


def generate_proposals(
    objectness_logits: tuple[Float[Array, " _n"], ...],
    anchor_deltas: tuple[Float[Array, "_n 4"], ...],
    anchors: tuple[Float[Array, "_n 4"], ...],
    image_size: Int[Array, " 2"],
    *,
    box_coder: CornerBoxCoder | CenterBoxCoder,
    pre_nms_topk: int,
    post_nms_topk: int,
    nms_threshold: float,
    min_size: float = 0.0,
    plus_one_widths: bool = False,
) -> Proposals:
    """Turns one image's anchors into proposals: best of each level, decode, clip, drop small, NMS, best of all.

    Agrees with detectron2's `find_top_rpn_proposals`, but for the fixed number of slots.
    """
    pixel = jnp.ones(2) if plus_one_widths else None
    level_boxes, level_logits, level_valid = [], [], []
    for logits, deltas, level_anchors in zip(objectness_logits, anchor_deltas, anchors, strict=True):
        top_logits, top = jax.lax.top_k(logits, min(pre_nms_topk, logits.shape[0]))
        boxes = clip_to_image(box_coder.decode(deltas[top], level_anchors[top]), image_size, pixel=pixel)
        # Sorted already; what NMS leaves need not be, for the best of all are chosen below.
        kept = suppress_sorted(boxes, is_nonempty(boxes, min_size=min_size), iou_threshold=nms_threshold)
        level_boxes.append(boxes)
        level_logits.append(top_logits)
        level_valid.append(kept)
    boxes, logits, valid = map(jnp.concatenate, (level_boxes, level_logits, level_valid))
    _, best = jax.lax.top_k(jnp.where(valid, logits, -jnp.inf), min(post_nms_topk, valid.shape[0]))
    return Proposals(boxes=boxes[best], objectness_logits=logits[best], valid=valid[best])
