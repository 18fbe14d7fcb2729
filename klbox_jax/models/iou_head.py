"""IoU-Net's head (Jiang et al., ECCV 2018): how well does a box fit its object?"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from klbox_jax.losses.box_regression import smooth_l1
from klbox_jax.models.box_head import BoxHead


class IoUHead(nn.Module):
    """A `BoxHead` of its own over the pooled features, and one number for each class.

    Attributes:
        num_classes: K, without the background.
        class_agnostic: one number for all classes instead of one for each.
        features: width of the two layers of the `BoxHead`.
        dtype: dtype of the `BoxHead`; the last product is float32.
    """

    num_classes: int
    class_agnostic: bool
    features: int = 1024
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, pooled: Float[Array, "n s s c"]) -> Float[Array, "n Kb"]:
        x = BoxHead(self.features, self.dtype, name="box_head")(pooled)
        num_outputs = 1 if self.class_agnostic else self.num_classes
        normal = nn.initializers.normal(0.01)
        return nn.Dense(num_outputs, kernel_init=normal, dtype=jnp.float32, name="iou_pred")(x)


def normalize_iou(iou: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the head is trained to say: `(IoU - 0.5) / 0.5`, so that IoUs from 0.5 to 1 become 0 to 1.

    The jittered boxes of training lie there; an IoU of 0 becomes -1.
    """
    return (iou - 0.5) / 0.5


def iou_from_logits(iou_logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """The predicted IoU, the inverse of `normalize_iou`.

    Deliberately not clipped to [0, 1]: a clip has no gradient outside, and a box whose prediction lies there
    would never be refined. Clip it where it is shown or multiplied with a score.
    """
    return 0.5 * (iou_logits + 1.0)


def iou_loss(iou_logits: Float[Array, "..."], iou: Float[Array, "..."]) -> Float[Array, "..."]:
    """Smooth-L1 (beta 1) between the head's output and the normalised IoU, unreduced.

    Args:
        iou_logits: the head's output for the class of each box.
        iou: true IoU of each box, same shape.

    Returns:
        float32, same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    return smooth_l1(iou_logits, normalize_iou(iou))
