"""The two-stage detector: backbone, feature pyramid, RPN and RoI heads."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from klbox_jax.models.fpn import FPN
from klbox_jax.models.roi_heads import RoIHeads
from klbox_jax.models.rpn import RPN
from klbox_jax.structures import Batch, BoxPredictions, Proposals, TrainOutputs


@flax.struct.dataclass
class Predictions:
    """Raw predictions for a batch, before post-processing.

    Attributes:
        boxes: predictions of the box head; row `i` belongs to row `i` of `proposals`.
        proposals: proposals of the first stage.
        pyramid: feature maps, for a mask head or an IoU head, which run on the detections; empty without these heads.
    """

    boxes: BoxPredictions
    proposals: Proposals
    pyramid: dict[str, Float[Array, "b _h _w c"]]


class GeneralizedRCNN(nn.Module):
    """Faster and Mask R-CNN (Ren et al. 2015; Lin et al. 2017; He et al. 2017).

    Attributes:
        backbone: maps normalized images to `res2`, `res3`, ...
        fpn: feature pyramid over the stages; if None, the stages themselves are `p2`, `p3`, ...
        rpn: the first stage.
        roi_heads: the second stage.
        pixel_mean, pixel_std: mean and standard deviation of the RGB channels, 0 to 255.
    """

    backbone: nn.Module
    fpn: FPN | None
    rpn: RPN
    roi_heads: RoIHeads
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def pyramid(self, images: UInt8[Array, "b h w 3"], image_size: Int[Array, "b 2"]):
        """Returns the feature maps `p2`, `p3`, ... of a batch; the padding is zero after normalization."""
        mean, std = (jnp.asarray(value)[None, None, None, :] for value in (self.pixel_mean, self.pixel_std))
        x = (images.astype(jnp.float32) - mean) / std
        h, w = images.shape[1:3]
        rows = jnp.arange(h)[None, :] < image_size[:, 0, None]
        columns = jnp.arange(w)[None, :] < image_size[:, 1, None]
        x = jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0.0)
        stages = self.backbone(x)
        if self.fpn is None:
            return {f"p{name.removeprefix('res')}": stage for name, stage in stages.items()}
        return self.fpn(stages)

    def init_all_heads(self, batch: Batch) -> None:
        """Runs every module once, on one empty box for each image, so that `init` makes all parameters.

        The parameters are the same as from `init` with `train_forward`, without tracing its losses and its sampling.
        """
        pyramid = self.pyramid(batch.images, batch.image_size)
        self.rpn(pyramid, batch.images.shape[1:3])
        count = batch.images.shape[0]
        boxes, classes = jnp.zeros((count, 1, 4)), jnp.zeros((count, 1), jnp.int32)
        self.roi_heads(pyramid, boxes)
        if self.roi_heads.mask_head is not None:
            self.predict_masks(pyramid, boxes, classes)
        if self.roi_heads.iou_head is not None:
            self.predict_iou(jax.tree.map(lambda features: features[0], pyramid), boxes[0], classes[0])

    def train_forward(
        self, batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | None = None
    ) -> TrainOutputs:
        """Returns the losses of a batch.

        Args:
            batch: images and their objects.
            key: random key of the sampled anchors and RoIs, the jittered boxes, the dropout and a sampled loss.
            step: training step, for a loss with a ramp.
        """
        rpn_keys, roi_keys = jax.random.split(key, (2, batch.images.shape[0]))
        pyramid = self.pyramid(batch.images, batch.image_size)

        # First stage: where may objects be?
        rpn_outputs = self.rpn(pyramid, batch.images.shape[1:3])
        rpn_losses = self.rpn.losses(rpn_outputs, batch.gt, batch.valid, rpn_keys)
        proposals = self.rpn.predict_proposals(rpn_outputs, batch.image_size, train=True)

        # Second stage: what are they, and where are their edges?
        loss_key, jitter_key, dropout_key = jax.random.split(jax.random.fold_in(key, 1), 3)
        heads = self.roi_heads
        samples = heads.sample(proposals, batch.gt, batch.valid, roi_keys)
        predictions = heads(pyramid, samples.boxes, dropout_key)
        outputs = [heads.box_predictor.losses(predictions, samples, key=loss_key, step=step)]
        if heads.mask_head is not None:
            outputs.append(heads.mask_head.losses(pyramid, heads.foreground_slots(samples), batch.gt))
        if heads.iou_head is not None:
            keys = jax.random.split(jitter_key, batch.images.shape[0])
            outputs.append(heads.iou_head.losses(pyramid, batch.gt, batch.image_size, batch.valid, keys))
        losses, metrics = dict(rpn_losses), {}
        for output in outputs:
            losses |= output.losses
            metrics |= output.metrics
        return TrainOutputs(losses=losses, metrics=metrics)

    def predict(self, batch: Batch) -> Predictions:
        """Returns the raw predictions for each proposal, the input of `postprocess.detect`."""
        pyramid = self.pyramid(batch.images, batch.image_size)
        rpn_outputs = self.rpn(pyramid, batch.images.shape[1:3])
        proposals = self.rpn.predict_proposals(rpn_outputs, batch.image_size, train=False)
        return Predictions(
            boxes=self.roi_heads(pyramid, proposals.boxes),
            proposals=proposals,
            pyramid=pyramid if self.roi_heads.iou_head or self.roi_heads.mask_head else {},
        )

    def predict_masks(
        self,
        pyramid: dict[str, Float[Array, "b _h _w c"]],
        boxes: Float[Array, "b d 4"],
        classes: Int[Array, "b d"],
    ) -> Float[Array, "b d m m"]:
        """Returns the masks of a batch's detections; see `MaskHead.predict`."""
        return self.roi_heads.mask_head.predict(pyramid, boxes, classes)

    def predict_iou(
        self,
        pyramid: dict[str, Float[Array, "_h _w c"]],
        boxes: Float[Array, "n 4"],
        classes: Int[Array, " n"],
    ) -> Float[Array, " n"]:
        """Returns the predicted IoUs of one image's boxes; see `IoUHead.predict`."""
        return self.roi_heads.iou_head.predict(pyramid, boxes, classes)
