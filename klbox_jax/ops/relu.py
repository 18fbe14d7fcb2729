"""The rectifier, whose gradient needs its output alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def relu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns `max(x, 0)`, NaN for NaN; the gradient at 0 is 0.

    Equal to `jax.nn.relu`, for reverse mode only. The output is the next layer's input and so is kept for the
    gradient anyway; from it one sees where the input was positive. With `jax.nn.relu` XLA works the output out
    again on the way back, for which it keeps the convolution's result and the shortcut too: a sixth more temporary
    memory in a bottleneck ResNet's training step. Behind a norm that is computed from the activations it does harm: the
    step of configs/scenes.py takes a third longer with it on CPUs.
    """
    # Not a maximum: that has one large operand, and XLA copies such operations into all that read them.
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def _forward(x):
    output = relu(x)
    return output, output


def _backward(output, cotangent):
    return (jnp.where(output <= 0, jnp.zeros_like(cotangent), cotangent),)


relu.defvjp(_forward, _backward)
