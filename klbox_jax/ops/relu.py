"""ReLU with a gradient that needs only its output."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def relu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns `max(x, 0)`, NaN for NaN; the gradient at 0 is 0.

    Equal to `jax.nn.relu`, but only for reverse-mode differentiation. The output is the next layer's input, so it is
    kept for the gradient anyway, and it shows where the input was positive. With `jax.nn.relu`, XLA computes the output
    again in the backward pass and keeps the convolution's result and the shortcut for that: a sixth more temporary
    memory in the training step of a bottleneck ResNet. After a norm that is computed from the
    activations, such as group norm, use `jax.nn.relu`: with this form the step of configs/scenes.py takes a third
    longer on CPUs.
    """
    # Not `maximum`: it has a single large operand, and XLA copies such operations into each operation that reads them.
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def _forward(x):
    output = relu(x)
    return output, output


def _backward(output, cotangent):
    return (jnp.where(output <= 0, jnp.zeros_like(cotangent), cotangent),)


relu.defvjp(_forward, _backward)
