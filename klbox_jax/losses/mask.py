"""The mask loss of Mask R-CNN, from logits, unreduced over RoIs."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def mask_of_class(mask_logits: Float[Array, "*n k s s"], classes: Int[Array, "*n"]) -> Float[Array, "*n s s"]:
    """Returns the mask logits of one class of each RoI.

    Args:
        mask_logits: one mask for each class, or a single one for all of them (k = 1).
        classes: 0 to K - 1. Padded RoIs and the background need a class in that range too.
    """
    if mask_logits.shape[-3] == 1:
        return mask_logits[..., 0, :, :]
    return jnp.take_along_axis(mask_logits, classes[..., None, None, None], axis=-3)[..., 0, :, :]


def mask_loss(
    mask_logits: Float[Array, "*n k s s"],
    classes: Int[Array, "*n"],
    targets: Float[Array, "*n s s"],
) -> Float[Array, "*n"]:
    """Computes the mean binary cross entropy of the true class' mask (He et al. 2017, section 3).

    The masks of the other classes take no gradient. The loss of detectron2 and torchvision is its mean over
    the foreground RoIs.

    Args:
        mask_logits: one mask for each class.
        classes: of the matched objects; for RoIs that are masked out later, any class from 0 to K - 1.
        targets: share of each cell that the object covers, 0 to 1.

    Returns:
        float32, one for each RoI.
    """
    logits = mask_of_class(mask_logits, classes).astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=(-2, -1))
