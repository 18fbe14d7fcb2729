"""Classification losses of the two stages, from logits, unreduced."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def objectness_loss(
    logits: Float[Array, "*n"], labels: Bool[Array, "*n"] | Int[Array, "*n"] | Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """Computes the sigmoid binary cross entropy of the RPN's objectness.

    Args:
        logits: one for each anchor.
        labels: 1 or True for an object, 0 for the background. Ignored anchors need any finite label and a
            mask in the reduction.

    Returns:
        float32, one for each anchor.
    """
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels.astype(jnp.float32))


def class_loss(logits: Float[Array, "*n K1"], classes: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Computes the softmax cross entropy of the box head's classes.

    Args:
        logits: K + 1 for each RoI, the background last.
        classes: 0 to K, K for the background. Padded RoIs need a class in that range too.

    Returns:
        float32, one for each RoI.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), classes)
