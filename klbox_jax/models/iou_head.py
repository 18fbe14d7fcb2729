"""The IoU head of IoU-Net (Jiang et al., ECCV 2018): predicts the IoU of a box with its object."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from klbox_jax.losses.box_regression import smooth_l1
from klbox_jax.losses.reduction import masked_mean
from klbox_jax.models.box_head import BoxHead
from klbox_jax.ops.box_jitter import jitter_boxes
from klbox_jax.ops.roi_pooler import RoIPooler
from klbox_jax.structures import GroundTruth, TrainOutputs


class IoUHead(nn.Module):
    """A separate `BoxHead` over the pooled features, and one output for each class.

    Attributes:
        num_classes: K, without the background.
        class_agnostic: one output for all classes instead of one output for each class.
        pooler: pools the features. It must be smooth in the box, because the refinement of boxes differentiates it.
        features: width of the two layers of the `BoxHead`.
        batch_size_per_image: number of jittered ground-truth boxes per image in training.
        loss_weight: factor of `loss_iou`.
        dtype: dtype of the `BoxHead`; the last product is float32.
    """

    num_classes: int
    class_agnostic: bool
    pooler: RoIPooler = RoIPooler(method="precise")
    features: int = 1024
    batch_size_per_image: int = 128
    loss_weight: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, pooled: Float[Array, "n s s c"]) -> Float[Array, "n Kb"]:
        """Returns the normalized IoU of each RoI for each class; see `normalize_iou`."""
        x = BoxHead(self.features, self.dtype, name="box_head")(pooled)
        num_outputs = 1 if self.class_agnostic else self.num_classes
        normal = nn.initializers.normal(0.01)
        return nn.Dense(num_outputs, kernel_init=normal, dtype=jnp.float32, name="iou_pred")(x)

    def predict(
        self,
        pyramid: dict[str, Float[Array, "_h _w c"]],
        boxes: Float[Array, "n 4"],
        classes: Int[Array, " n"],
    ) -> Float[Array, " n"]:
        """Returns the predicted IoU of one image's boxes with objects of these classes.

        Differentiable in the boxes (Jiang et al. 2018, section 3.3).
        """
        return iou_from_logits(self._logits_of_class(self.pooler(pyramid, boxes), classes))

    def losses(
        self,
        pyramid: dict[str, Float[Array, "b _h _w c"]],
        gt: GroundTruth,
        image_size: Int[Array, "b 2"],
        image_valid: Bool[Array, " b"],
        keys: Key[Array, " b"],
    ) -> TrainOutputs:
        """Returns `loss_iou`: smooth-L1 between the output and the normalized true IoU, a mean over jittered boxes.

        The boxes are annotated boxes, jittered evenly over the IoUs from 0.5 to 1 (Jiang et al. 2018, section 3.1), so
        the training of this head does not depend on the predictions of the box head.

        Args:
            pyramid: feature maps of the batch.
            gt: objects of the batch.
            image_size: height and width of each image in pixels.
            image_valid: False for a padding image.
            keys: random keys of the jitter, one for each image.
        """

        def jitter(gt, size, key):
            return jitter_boxes(key, gt, size, num_samples=self.batch_size_per_image)

        jittered = jax.vmap(jitter)(gt, image_size, keys)
        classes = jnp.take_along_axis(gt.classes, jittered.gt_index, axis=1)
        pooled = self.pooler.pool_batch(pyramid, jittered.boxes)
        logits = self._logits_of_class(pooled, classes.reshape(-1)).reshape(classes.shape)
        valid = jittered.valid & image_valid[:, None]
        loss = iou_loss(logits, jittered.iou)
        metrics = {"iou_error": masked_mean(jnp.abs(iou_from_logits(logits) - jittered.iou), valid)}
        return TrainOutputs(
            losses={"loss_iou": self.loss_weight * masked_mean(loss, valid)},
            metrics=jax.lax.stop_gradient(metrics),
        )

    def _logits_of_class(
        self, pooled: Float[Array, "n s s c"], classes: Int[Array, " n"]
    ) -> Float[Array, " n"]:
        logits = self(pooled)
        # A class-agnostic head has one column for all classes.
        column = classes if logits.shape[1] > 1 else jnp.zeros_like(classes)
        return jnp.take_along_axis(logits, column[:, None], axis=1)[:, 0]


def normalize_iou(iou: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the training target of an IoU, `(IoU - 0.5) / 0.5`: IoUs from 0.5 to 1 become 0 to 1.

    The jittered boxes of training have such IoUs; an IoU of 0 becomes -1.
    """
    return (iou - 0.5) / 0.5


def iou_from_logits(iou_logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the predicted IoU, the inverse of `normalize_iou`.

    It is not clipped to [0, 1] on purpose: a clip has no gradient outside, and a box with such a prediction would
    never be refined. Clip the value before it is displayed or multiplied with a score.
    """
    return 0.5 * (iou_logits + 1.0)


def iou_loss(iou_logits: Float[Array, "..."], iou: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes smooth-L1 (beta 1) between the head's output and the normalized IoU, unreduced.

    Args:
        iou_logits: output of the head for the class of each box.
        iou: true IoU of each box, same shape.

    Returns:
        float32, same shape.

    Raises:
        ValueError: the shapes differ.
    """
    return smooth_l1(iou_logits, normalize_iou(iou))
