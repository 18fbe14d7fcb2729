"""The second stage: what is in each RoI, where its edges are, and how sure each edge is."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.losses.detection import class_loss
from klbox_jax.losses.label_noise import label_stds
from klbox_jax.losses.mask import mask_loss, mask_of_class
from klbox_jax.losses.reduction import masked_mean, masked_sum
from klbox_jax.models.box_head import BoxPredictor
from klbox_jax.models.iou_head import IoUHead, iou_from_logits, iou_loss
from klbox_jax.models.mask_head import MaskHead
from klbox_jax.models.vgg import VGGBoxHead
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.box_jitter import jitter_boxes
from klbox_jax.ops.masks import crop_and_resize_masks
from klbox_jax.ops.matcher import Label, match_boxes
from klbox_jax.ops.roi_pooler import RoIPooler
from klbox_jax.ops.sampling import subsample_labels
from klbox_jax.structures import BoxPredictions, GroundTruth, Proposals, RoISamples


@flax.struct.dataclass
class RoILosses:
    """Training losses of the heads, and numbers to watch.

    Attributes:
        losses: `loss_cls`, `loss_box_reg`, `loss_mask` of a mask head and `loss_iou` of an IoU head; summed
            and differentiated.
        metrics: never differentiated.
    """

    losses: dict[str, Array]
    metrics: dict[str, Array]


class RoIHeads(nn.Module):
    """Samples RoIs, pools their features, predicts, and scores the predictions.

    Attributes:
        num_classes: K, without the background.
        box_loss: which regression loss trains the edges, and whether they have variances.
        box_pooler: cuts out the features of the box head.
        box_head: pooled features to one vector for each RoI, or to a map whose mean is taken.
        box_coder: offsets between a RoI and its box.
        class_agnostic: one box for all classes.
        batch_size_per_image: RoIs sampled in training.
        positive_fraction: at most this share of them is foreground.
        iou_threshold: IoU from which a RoI is foreground.
        box_loss_weight: factor of `loss_box_reg`, whatever the loss.
        mask_head: predicts the mask of each detection (He et al. 2017), or None.
        mask_pooler: cuts out its features.
        iou_head: predicts the IoU of a box with its object (Jiang et al. 2018), or None.
        iou_pooler: cuts out its features; smooth in the box, for the refinement differentiates it.
        iou_batch_size_per_image: jittered ground-truth boxes that train it.
        iou_loss_weight: factor of `loss_iou`.
    """

    num_classes: int
    box_loss: BoxLoss
    box_pooler: RoIPooler
    box_head: nn.Module
    box_coder: CornerBoxCoder | CenterBoxCoder = CornerBoxCoder()
    class_agnostic: bool = False
    batch_size_per_image: int = 512
    positive_fraction: float = 0.25
    iou_threshold: float = 0.5
    box_loss_weight: float = 1.0
    mask_head: MaskHead | None = None
    mask_pooler: RoIPooler | None = None
    iou_head: IoUHead | None = None
    iou_pooler: RoIPooler | None = None
    iou_batch_size_per_image: int = 128
    iou_loss_weight: float = 1.0

    def setup(self):
        self.box_predictor = BoxPredictor(
            num_classes=self.num_classes,
            class_agnostic=self.class_agnostic,
            predict_log_vars=self.box_loss.has_variances,
        )

    def __call__(
        self,
        pyramid: dict[str, Float[Array, "b _h _w c"]],
        boxes: Float[Array, "b r 4"],
        key: Key[Array, ""] | None = None,
    ) -> BoxPredictions:
        """Predicts class, box and log variances of each RoI; `key` draws the dropout of a VGG head in training."""
        pooled = jax.vmap(self.box_pooler)(pyramid, boxes)
        b, r = boxes.shape[:2]
        pooled = pooled.reshape(b * r, *pooled.shape[2:])
        drops = isinstance(self.box_head, VGGBoxHead) and key is not None
        x = self.box_head(pooled, key) if drops else self.box_head(pooled)
        predictions = self.box_predictor(x.mean(axis=(1, 2)) if x.ndim == 4 else x)
        return jax.tree.map(lambda x: x.reshape(b, r, *x.shape[1:]), predictions)

    def predict_masks(
        self,
        pyramid: dict[str, Float[Array, "b _h _w c"]],
        boxes: Float[Array, "b d 4"],
        classes: Int[Array, "b d"],
    ) -> Float[Array, "b d m m"]:
        """Returns the mask of each box for its class: probabilities, the mask filling the box."""
        return jax.nn.sigmoid(self._mask_logits(pyramid, boxes, classes))

    def _mask_logits(self, pyramid, boxes, classes):
        pooled = jax.vmap(self.mask_pooler)(pyramid, boxes)
        b, r = classes.shape
        logits = self.mask_head(pooled.reshape(b * r, *pooled.shape[2:]))
        return mask_of_class(logits, classes.reshape(-1)).reshape(b, r, *logits.shape[2:])

    def predict_iou(
        self,
        pyramid: dict[str, Float[Array, "_h _w c"]],
        boxes: Float[Array, "n 4"],
        classes: Int[Array, " n"],
    ) -> Float[Array, " n"]:
        """Returns the IoU that one image's boxes are believed to have with their objects of these classes.

        Differentiable in the boxes (Jiang et al. 2018, section 3.3).
        """
        return iou_from_logits(self._iou_logits(self.iou_pooler(pyramid, boxes), classes))

    def _iou_logits(self, pooled: Float[Array, "n s s c"], classes: Int[Array, " n"]) -> Float[Array, " n"]:
        logits = self.iou_head(pooled)
        # A class-agnostic head has one column for every class.
        column = classes if logits.shape[1] > 1 else jnp.zeros_like(classes)
        return jnp.take_along_axis(logits, column[:, None], axis=1)[:, 0]

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

    def losses(
        self,
        predictions: BoxPredictions,
        samples: RoISamples,
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> RoILosses:
        """Returns the losses, each a sum over the global batch divided by all its valid sampled RoIs.

        Foreground RoIs alone have a box loss, yet all RoIs are counted, as in detectron2: then an image
        full of objects does not weigh less per object, and rows of a table share the normalizer.

        Args:
            predictions: the head's outputs for the samples.
            samples: the RoIs and what they were matched to.
            key: draws the samples of a sampled loss.
            step: of the training; a loss with a ramp needs it.

        Raises:
            ValueError: the box loss needs a key, a step, or the label noise of each edge, which is not there.
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
        log_vars = of_class(predictions.box_log_vars) if self.box_loss.has_variances else None
        gt_boxes = jnp.where(foreground[:, :, None], samples.gt_boxes, samples.boxes)
        targets = self.box_coder.encode(gt_boxes, samples.boxes)
        stds = None
        if self.box_loss.needs_label_stds:
            stds = label_stds(
                gt_boxes,
                samples.gt_box_stds,
                source=self.box_loss.label_noise,
                value=self.box_loss.label_noise_value,
            )
            stds = self.box_coder.encode_stds(stds, samples.boxes)
        box_loss = self.box_loss(deltas, log_vars, targets, label_stds=stds, key=key, step=step)
        box_loss = masked_sum(box_loss.sum(axis=-1), foreground) / normalizer
        cls_loss = (
            masked_sum(class_loss(predictions.class_logits, samples.gt_classes), samples.valid) / normalizer
        )

        correct = predictions.class_logits.argmax(axis=-1) == samples.gt_classes
        metrics = {
            "num_foreground": foreground.sum() / jnp.maximum(samples.valid.any(axis=1).sum(), 1),
            "box_error": masked_mean(jnp.abs(deltas - targets).mean(axis=-1), foreground),
            "accuracy_foreground": masked_mean(correct.astype(jnp.float32), foreground),
        }
        if log_vars is not None:
            variances = self.box_loss.variance_of(log_vars)
            metrics["mean_sigma"] = masked_mean(jnp.sqrt(variances).mean(axis=-1), foreground)
            metrics["mean_log_var"] = masked_mean(jnp.log(variances).mean(axis=-1), foreground)
        losses = {"loss_cls": cls_loss, "loss_box_reg": self.box_loss_weight * box_loss}
        return RoILosses(losses=losses, metrics=jax.lax.stop_gradient(metrics))

    def mask_losses(
        self, pyramid: dict[str, Float[Array, "b _h _w c"]], samples: RoISamples, gt: GroundTruth
    ) -> RoILosses:
        """Returns the loss of the mask head, a mean over the foreground RoIs of the global batch."""
        # Sampling puts the foreground first, and there is no more of it than this.
        most = int(self.batch_size_per_image * self.positive_fraction)
        samples = jax.tree.map(lambda x: x[:, :most], samples)
        foreground = samples.is_foreground & samples.valid
        classes = jnp.where(foreground, samples.gt_classes, 0)
        logits = self._mask_logits(pyramid, samples.boxes, classes)

        def targets_of(gt, samples):
            return crop_and_resize_masks(
                gt.masks, gt.boxes, samples.boxes, samples.gt_index, output_size=logits.shape[-1]
            )

        targets = jax.vmap(targets_of)(gt, samples)
        # The class is chosen already: a single mask is left for each RoI.
        loss = mask_loss(logits[:, :, None], jnp.zeros_like(classes), targets)
        right = ((logits > 0) == (targets > 0.5)).mean(axis=(-2, -1))
        return RoILosses(
            losses={"loss_mask": masked_mean(loss, foreground)},
            metrics=jax.lax.stop_gradient({"mask_accuracy": masked_mean(right, foreground)}),
        )

    def iou_losses(
        self,
        pyramid: dict[str, Float[Array, "b _h _w c"]],
        gt: GroundTruth,
        image_size: Int[Array, "b 2"],
        image_valid: Bool[Array, " b"],
        keys: Key[Array, " b"],
    ) -> RoILosses:
        """Returns the loss of the IoU head: smooth-L1 between its output and the normalized true IoU.

        Its boxes are the annotated ones, jittered, evenly spread over the IoUs from 0.5 to 1 (Jiang et al.
        2018, section 3.1), so that the head never depends on what the box head has learned.
        """

        def single(gt, size, key):
            return jitter_boxes(key, gt, size, num_samples=self.iou_batch_size_per_image)

        jittered = jax.vmap(single)(gt, image_size, keys)
        classes = jnp.take_along_axis(gt.classes, jittered.gt_index, axis=1)
        pooled = jax.vmap(self.iou_pooler)(pyramid, jittered.boxes)
        b, r = classes.shape
        logits = self._iou_logits(pooled.reshape(b * r, *pooled.shape[2:]), classes.reshape(-1))
        logits = logits.reshape(b, r)
        valid = jittered.valid & image_valid[:, None]
        loss = iou_loss(logits, jittered.iou)
        metrics = {"iou_error": masked_mean(jnp.abs(iou_from_logits(logits) - jittered.iou), valid)}
        return RoILosses(
            losses={"loss_iou": self.iou_loss_weight * masked_mean(loss, valid)},
            metrics=jax.lax.stop_gradient(metrics),
        )


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
