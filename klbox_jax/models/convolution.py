"""A 2-D convolution with torch's padding, as a Flax module."""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from klbox_jax.ops.convolution import conv, depthwise_conv, full_conv, pointwise_conv

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A 2-D convolution with torch's padding: `kernel_size // 2` zeros on every side.

    Params: `kernel` [k, k, C_in / groups, C_out] and, with `use_bias`, `bias` [C_out]. Supports only reverse-mode
    differentiation: the 1x1 and 3x3 forms have no forward-mode rule.

    Attributes:
        features: output channels.
        kernel_size: side of the square kernel; odd, so that stride 1 keeps the size.
        strides: step in both directions; a side of n cells becomes ceil(n / strides).
        groups: number of channel groups; equal to both channel counts for a depthwise convolution.
        use_bias: add a bias for each channel.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.
        dtype: dtype of the arithmetic and the output; None is that of input and params together.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = he_normal_fan_out
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """Returns the convolved maps.

        Raises:
            ValueError: the kernel size is even, or the groups do not divide the channels.
        """
        channels = x.shape[-1]
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd.")
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide {channels} input and {self.features} output channels."
            )
        shape = (self.kernel_size, self.kernel_size, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)

        if self.kernel_size == 1 and self.groups == 1:
            y = pointwise_conv(x, kernel, self.strides)
        elif self.kernel_size == 3 and self.groups == channels == self.features:
            y = depthwise_conv(x, kernel, self.strides)
        elif self.kernel_size == 3 and self.groups == 1:
            y = full_conv(x, kernel, self.strides)
        else:
            y = conv(x, kernel, self.strides, self.groups)
        return y if bias is None else y + bias[None, None, None, :]
