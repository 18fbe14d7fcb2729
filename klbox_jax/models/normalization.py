"""Frozen batch norm, for networks that start from pretrained weights.

It has no live batch statistics, so a batch of N images gives the same results as N batches of one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

EPSILON = 1e-5


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and a fixed affine part (detectron2's `FrozenBatchNorm2d`).

    Its four params `scale`, `bias`, `mean`, `var` have no gradient. Weight decay would still change them: exclude
    them from the optimizer.

    Attributes:
        dtype: dtype of the output, or None for that of the input; the arithmetic is float32.
    """

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
        """Returns `(x - mean) / sqrt(var + EPSILON) * scale + bias`, folded into one multiply-add."""
        shape = (x.shape[-1],)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        params = (
            self.param("scale", ones, shape, jnp.float32),
            self.param("bias", zeros, shape, jnp.float32),
            self.param("mean", zeros, shape, jnp.float32),
            self.param("var", ones, shape, jnp.float32),
        )
        scale, bias, mean, var = jax.lax.stop_gradient(params)
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        shift = bias - mean * factor
        channels_last = (1,) * (x.ndim - 1) + shape
        y = x.astype(jnp.float32) * factor.reshape(channels_last) + shift.reshape(channels_last)
        return y.astype(self.dtype or x.dtype)
