"""The mask head of Mask R-CNN (He et al., ICCV 2017, figure 4, right)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from klbox_jax.losses.mask import mask_loss, mask_of_class
from klbox_jax.losses.reduction import masked_mean
from klbox_jax.models.convolution import Conv
from klbox_jax.ops.masks import crop_and_resize_masks
from klbox_jax.ops.roi_pooler import RoIPooler
from klbox_jax.structures import GroundTruth, RoISamples, TrainOutputs


class Deconv2x2(nn.Module):
    """A transposed convolution with kernel 2 and stride 2: each cell becomes 2 x 2 cells.

    The cells do not overlap, so it is one product. Params: `kernel` [2, 2, C_in, C_out], which is torch's
    [C_in, C_out, 2, 2] with transposed axes, and `bias` [C_out].

    Attributes:
        features: output channels.
        dtype: dtype of the arithmetic and the output; None is that of input and params together.
    """

    features: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        b, h, w, c = x.shape
        # The variance of detectron2 and torchvision: their "fan out" counts the inputs of this kernel.
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (2, 2, c, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("bhwc,ijcf->bhiwjf", x, kernel).reshape(b, 2 * h, 2 * w, self.features)
        return y + bias[None, None, None, :]


class MaskHead(nn.Module):
    """3x3 convolutions, a transposed convolution that doubles the map, and one mask for each class.

    Layers have torchvision's names: `mask_fcn1`, ..., `conv5_mask`, `mask_fcn_logits`.

    Attributes:
        num_classes: K; there is no mask of the background.
        pooler: pools the features.
        features: channels of every layer except the last.
        num_convs: number of 3x3 convolutions.
        dtype: dtype of all layers; None is that of input and params together.
    """

    num_classes: int
    pooler: RoIPooler = RoIPooler(resolution=14)
    features: int = 256
    num_convs: int = 4
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, pooled: Float[Array, "n s s c"]) -> Float[Array, "n k s2 s2"]:
        """Returns the mask logits of each class, float32, at twice the pooled resolution."""
        x = pooled
        for number in range(1, self.num_convs + 1):
            x = nn.relu(Conv(self.features, dtype=self.dtype, name=f"mask_fcn{number}")(x))
        x = nn.relu(Deconv2x2(self.features, self.dtype, name="conv5_mask")(x))
        # detectron2's initializer: all masks start at a probability of one half.
        init = nn.initializers.normal(0.001)
        logits = Conv(
            self.num_classes, kernel_size=1, kernel_init=init, dtype=self.dtype, name="mask_fcn_logits"
        )(x)
        return jnp.moveaxis(logits.astype(jnp.float32), -1, 1)

    def predict(
        self,
        pyramid: dict[str, Float[Array, "b _h _w c"]],
        boxes: Float[Array, "b d 4"],
        classes: Int[Array, "b d"],
    ) -> Float[Array, "b d m m"]:
        """Returns the mask of each box for its class: probabilities; the mask fills the box."""
        return jax.nn.sigmoid(self._logits_of_class(pyramid, boxes, classes))

    def losses(
        self, pyramid: dict[str, Float[Array, "b _h _w c"]], samples: RoISamples, gt: GroundTruth
    ) -> TrainOutputs:
        """Returns `loss_mask`, a mean over the foreground RoIs of the global batch.

        Args:
            pyramid: feature maps of the batch.
            samples: RoIs of the batch; leave out rows that are never foreground, as each row costs a forward pass.
            gt: objects of the batch, with masks.
        """
        foreground = samples.is_foreground & samples.valid
        classes = jnp.where(foreground, samples.gt_classes, 0)
        logits = self._logits_of_class(pyramid, samples.boxes, classes)

        def targets_of_image(gt, samples):
            return crop_and_resize_masks(
                gt.masks, gt.boxes, samples.boxes, samples.gt_index, output_size=logits.shape[-1]
            )

        targets = jax.vmap(targets_of_image)(gt, samples)
        # The logits are those of the RoI's class: a single mask for each RoI.
        loss = mask_loss(logits[:, :, None], jnp.zeros_like(classes), targets)
        right = ((logits > 0) == (targets > 0.5)).mean(axis=(-2, -1))
        return TrainOutputs(
            losses={"loss_mask": masked_mean(loss, foreground)},
            metrics=jax.lax.stop_gradient({"mask_accuracy": masked_mean(right, foreground)}),
        )

    def _logits_of_class(self, pyramid, boxes, classes):
        logits = self(self.pooler.pool_batch(pyramid, boxes))
        return mask_of_class(logits, classes.reshape(-1)).reshape(*classes.shape, *logits.shape[2:])
