"""The two-stage detector: backbone, pyramid, proposals, box head."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from klbox_jax.models.fpn import FPN
from klbox_jax.models.roi_heads import RoIHeads
from klbox_jax.models.rpn import RPN
from klbox_jax.structures import Batch, BoxPredictions, Proposals


@flax.struct.dataclass
class TrainOutputs:
    """Losses of a batch.

    Attributes:
        losses: scalars whose sum is minimised: `loss_rpn_cls`, `loss_rpn_loc`, `loss_cls`, `loss_box_reg`.
        metrics: scalars to watch.
    """

    losses: dict[str, Float[Array, ""]]
    metrics: dict[str, Float[Array, ""]]


@flax.struct.dataclass
class Predictions:
    """Raw answer for a batch, before post-processing: row `i` of `boxes` belongs to row `i` of `proposals`."""

    boxes: BoxPredictions
    proposals: Proposals


class GeneralizedRCNN(nn.Module):
    """Faster R-CNN with a feature pyramid (Ren et al. 2015; Lin et al. 2017).

    Attributes:
        backbone: maps normalized images to `res2`, `res3`, ...
        fpn: the pyramid over it.
        rpn: the first stage.
        roi_heads: the second stage.
        pixel_mean, pixel_std: of the RGB channels, 0 to 255.
    """

    backbone: nn.Module
    fpn: FPN
    rpn: RPN
    roi_heads: RoIHeads
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def pyramid(self, images: UInt8[Array, "b h w 3"], image_size: Int[Array, "b 2"]):
        """Returns the feature maps of normalized images, whose padding is zero after normalization."""
        mean, std = (jnp.asarray(value)[None, None, None, :] for value in (self.pixel_mean, self.pixel_std))
        x = (images.astype(jnp.float32) - mean) / std
        h, w = images.shape[1:3]
        rows = jnp.arange(h)[None, :] < image_size[:, 0, None]
        columns = jnp.arange(w)[None, :] < image_size[:, 1, None]
        x = jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0.0)
        return self.fpn(self.backbone(x))

    def train_forward(self, batch: Batch, key: Key[Array, ""]) -> TrainOutputs:
        """Returns the losses of a batch; `key` draws the anchors and the RoIs that are trained on."""
        rpn_keys, roi_keys = jax.random.split(key, (2, batch.images.shape[0]))
        pyramid = self.pyramid(batch.images, batch.image_size)

        # First stage: where may objects be?
        rpn_outputs = self.rpn(pyramid, batch.images.shape[1:3])
        rpn_losses = self.rpn.losses(rpn_outputs, batch.gt, batch.valid, rpn_keys)
        proposals = self.rpn.proposals(rpn_outputs, batch.image_size, train=True)

        # Second stage: what are they, and where are their edges?
        samples = self.roi_heads.sample(proposals, batch.gt, batch.valid, roi_keys)
        predictions = self.roi_heads(pyramid, samples.boxes)
        roi = self.roi_heads.losses(predictions, samples)
        return TrainOutputs(losses=rpn_losses | roi.losses, metrics=roi.metrics)

    def predict(self, batch: Batch) -> Predictions:
        """Returns the raw predictions for each proposal; `postprocess.detect` makes detections of them."""
        pyramid = self.pyramid(batch.images, batch.image_size)
        rpn_outputs = self.rpn(pyramid, batch.images.shape[1:3])
        proposals = self.rpn.proposals(rpn_outputs, batch.image_size, train=False)
        return Predictions(boxes=self.roi_heads(pyramid, proposals.boxes), proposals=proposals)
