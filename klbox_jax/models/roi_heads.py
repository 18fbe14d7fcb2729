"""The second stage: what is in each RoI, where its edges are, and how sure each edge is."""

from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from klbox_jax.losses.box_regression import kl_loss_terms, kl_variance_of, smooth_l1
from klbox_jax.losses.detection import class_loss
from klbox_jax.losses.reduction import masked_mean, masked_sum
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.matcher import Label, match_boxes
from klbox_jax.ops.roi_pooling import multilevel_roi_align
from klbox_jax.ops.sampling import subsample_labels
from klbox_jax.structures import BoxPredictions, GroundTruth, Proposals, RoISamples

BoxLoss = Literal["smooth_l1", "kl"]


@flax.struct.dataclass
class RoILosses:
    """Training losses of the box head, and numbers to watch.

    Attributes:
        losses: `loss_cls` and `loss_box_reg`, which are summed and differentiated.
        metrics: never differentiated.
    """

    losses: dict[str, Array]
    metrics: dict[str, Array]


class BoxHead(nn.Module):
    """Two fully connected layers over the pooled features.

    Attributes:
        features: width of each layer.
    """

    features: int = 1024

    @nn.compact
    def __call__(self, pooled: Float[Array, "n s s c"]) -> Float[Array, "n f"]:
        x = pooled.reshape(pooled.shape[0], -1)
        x = nn.relu(nn.Dense(self.features, kernel_init=nn.initializers.he_uniform(), name="fc1")(x))
        return nn.relu(nn.Dense(self.features, kernel_init=nn.initializers.he_uniform(), name="fc2")(x))


class BoxPredictor(nn.Module):
    """Linear layers for the class, the corner offsets and, for a probabilistic loss, their log variances.

    Attributes:
        num_classes: K, without the background.
        class_agnostic: one box for all classes instead of one for each.
        predict_log_vars: adds the log-variance branch (He et al. 2019, section 3.1), initialised with
            N(0, 1e-4), so that training starts at sigma = 1.
    """

    num_classes: int
    class_agnostic: bool
    predict_log_vars: bool

    @nn.compact
    def __call__(self, x: Float[Array, "n f"]) -> BoxPredictions:
        num_boxes = 1 if self.class_agnostic else self.num_classes
        normal = nn.initializers.normal

        def boxes(name, stddev):
            rows = nn.Dense(num_boxes * 4, kernel_init=normal(stddev), name=name)(x)
            return rows.reshape(-1, num_boxes, 4).astype(jnp.float32)

        logits = nn.Dense(self.num_classes + 1, kernel_init=normal(0.01), name="cls_score")(x)
        return BoxPredictions(
            class_logits=logits.astype(jnp.float32),
            box_deltas=boxes("bbox_pred", 0.001),
            box_log_vars=boxes("bbox_log_var", 0.0001) if self.predict_log_vars else None,
        )


class RoIHeads(nn.Module):
    """Samples RoIs, pools their features, predicts, and scores the predictions.

    Attributes:
        num_classes: K, without the background.
        box_loss: which regression loss trains the head; all but `smooth_l1` add the log-variance branch.
        box_coder: offsets between a RoI and its box.
        features: width of the box head.
        class_agnostic: one box for all classes.
        levels: pyramid levels that RoIs are pooled from, finest first.
        pooler_resolution, pooler_sampling_ratio: RoIAlign's output size and samples per side of a bin.
        canonical_box_size, canonical_level: a box of that side in pixels is pooled from that level.
        batch_size_per_image: RoIs sampled in training.
        positive_fraction: at most this share of them is foreground.
        iou_threshold: IoU from which a RoI is foreground.
        log_var_clamp: range of alpha.
        smooth_l1_beta: where smooth-L1 turns from quadratic to linear, in coded units.
        box_loss_weight: factor of `loss_box_reg`, whatever the loss.
    """

    num_classes: int
    box_loss: BoxLoss
    box_coder: CornerBoxCoder | CenterBoxCoder = CornerBoxCoder()
    features: int = 1024
    class_agnostic: bool = False
    levels: tuple[int, ...] = (2, 3, 4, 5)
    pooler_resolution: int = 7
    pooler_sampling_ratio: int = 2
    canonical_box_size: float = 224.0
    canonical_level: int = 4
    batch_size_per_image: int = 512
    positive_fraction: float = 0.25
    iou_threshold: float = 0.5
    log_var_clamp: tuple[float, float] = (-7.0, 7.0)
    smooth_l1_beta: float = 1.0
    box_loss_weight: float = 1.0

    def setup(self):
        self.box_head = BoxHead(self.features)
        self.box_predictor = BoxPredictor(
            num_classes=self.num_classes,
            class_agnostic=self.class_agnostic,
            predict_log_vars=self.box_loss != "smooth_l1",
        )

    def __call__(
        self, pyramid: dict[str, Float[Array, "b _h _w c"]], boxes: Float[Array, "b r 4"]
    ) -> BoxPredictions:
        """Predicts class, box and log variances of each RoI."""

        def pool(maps, boxes):
            return multilevel_roi_align(
                maps,
                boxes,
                strides=[2**level for level in self.levels],
                output_size=self.pooler_resolution,
                sampling_ratio=self.pooler_sampling_ratio,
                min_level=self.levels[0],
                canonical_box_size=self.canonical_box_size,
                canonical_level=self.canonical_level,
            )

        pooled = jax.vmap(pool)([pyramid[f"p{level}"] for level in self.levels], boxes)
        b, r = boxes.shape[:2]
        predictions = self.box_predictor(self.box_head(pooled.reshape(b * r, *pooled.shape[2:])))
        return jax.tree.map(lambda x: x.reshape(b, r, *x.shape[1:]), predictions)

    def sample(
        self, proposals: Proposals, gt: GroundTruth, image_valid: Bool[Array, " b"], keys: Key[Array, " b"]
    ):
        """Returns the `RoISamples` of a batch: proposals and ground-truth boxes, matched and subsampled."""

        def single(proposals, gt, key):
            return sample_rois(
                proposals,
                gt,
                key,
                num_classes=self.num_classes,
                iou_threshold=self.iou_threshold,
                num_samples=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
            )

        samples = jax.vmap(single)(proposals, gt, keys)
        return samples.replace(valid=samples.valid & image_valid[:, None])

    def losses(self, predictions: BoxPredictions, samples: RoISamples) -> RoILosses:
        """Returns the losses, each a sum over the global batch divided by all its valid sampled RoIs.

        Foreground RoIs alone have a box loss, yet all RoIs are counted, as in detectron2: then an image
        full of objects does not weigh less per object, and rows of a table share the normalizer.
        """
        foreground = samples.is_foreground & samples.valid
        normalizer = jnp.maximum(samples.valid.sum(), 1)
        # The background has no box; its rows read class 0 and are masked below.
        classes = jnp.where(samples.is_foreground, samples.gt_classes, 0)

        def of_class(rows):
            if rows.shape[2] == 1:
                return rows[:, :, 0]
            return jnp.take_along_axis(rows, classes[:, :, None, None], axis=2)[:, :, 0]

        deltas = of_class(predictions.box_deltas)
        targets = self.box_coder.encode(
            jnp.where(foreground[:, :, None], samples.gt_boxes, samples.boxes), samples.boxes
        )
        metrics = {
            "num_foreground": foreground.sum() / jnp.maximum(samples.valid.any(axis=1).sum(), 1),
            "box_error": masked_mean(jnp.abs(deltas - targets).mean(axis=-1), foreground),
        }
        if self.box_loss == "smooth_l1":
            box_loss = smooth_l1(deltas, targets, beta=self.smooth_l1_beta)
        else:
            log_vars = of_class(predictions.box_log_vars)
            terms = kl_loss_terms(deltas, log_vars, targets, clamp=self.log_var_clamp)
            box_loss = terms.box_term + terms.alpha_term
            sigma = jnp.sqrt(kl_variance_of(log_vars, clamp=self.log_var_clamp))
            metrics["loss_box_term"] = masked_sum(terms.box_term.sum(axis=-1), foreground) / normalizer
            metrics["loss_alpha_term"] = masked_sum(terms.alpha_term.sum(axis=-1), foreground) / normalizer
            metrics["mean_sigma"] = masked_mean(sigma.mean(axis=-1), foreground)
        box_loss = masked_sum(box_loss.sum(axis=-1), foreground) / normalizer

        cls_loss = (
            masked_sum(class_loss(predictions.class_logits, samples.gt_classes), samples.valid) / normalizer
        )
        correct = predictions.class_logits.argmax(axis=-1) == samples.gt_classes
        metrics["accuracy_foreground"] = masked_mean(correct.astype(jnp.float32), foreground)
        losses = {"loss_cls": cls_loss, "loss_box_reg": self.box_loss_weight * box_loss}
        return RoILosses(losses=losses, metrics=jax.lax.stop_gradient(metrics))


def sample_rois(
    proposals: Proposals,
    gt: GroundTruth,
    key: Key[Array, ""],
    *,
    num_classes: int,
    iou_threshold: float,
    num_samples: int,
    positive_fraction: float,
) -> RoISamples:
    """Matches one image's proposals, and its ground-truth boxes beside them, and draws the RoIs to train on."""
    boxes = jnp.concatenate([proposals.boxes, gt.boxes])
    valid = jnp.concatenate([proposals.valid, gt.valid & ~gt.is_crowd])
    match = match_boxes(boxes, gt, thresholds=(iou_threshold, iou_threshold), allow_low_quality_matches=False)
    labels = jnp.where(valid, match.labels, Label.IGNORE)
    samples = subsample_labels(key, labels, num_samples=num_samples, positive_fraction=positive_fraction)
    gt_index = match.gt_index[samples.indices]
    return RoISamples(
        boxes=boxes[samples.indices],
        gt_index=gt_index,
        gt_boxes=gt.boxes[gt_index],
        gt_classes=jnp.where(samples.is_positive, gt.classes[gt_index], num_classes),
        is_foreground=samples.is_positive,
        valid=samples.valid,
        gt_box_stds=None if gt.box_stds is None else gt.box_stds[gt_index],
    )
