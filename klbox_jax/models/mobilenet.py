"""MobileNetV2 (Sandler et al., CVPR 2018, table 2) at width 1.0, equal to torchvision's `mobilenet_v2`."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from klbox_jax.models.convolution import Conv
from klbox_jax.models.normalization import FrozenBatchNorm

# For each stage of the paper's table: expansion, output channels, number of blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# Channels of the last map of each resolution; the channels identify its stage.
OUT_CHANNELS = {"res2": 24, "res3": 32, "res4": 96, "res5": 320}
OUT_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class ConvNorm(nn.Module):
    """A convolution, frozen batch norm and, unless `linear`, ReLU6."""

    features: int
    kernel_size: int
    strides: int = 1
    groups: int = 1
    linear: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """Returns the convolved, normalized maps."""
        x = Conv(
            self.features,
            self.kernel_size,
            self.strides,
            self.groups,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = FrozenBatchNorm(name="norm")(x)
        return x if self.linear else jax.nn.relu6(x)


class InvertedResidual(nn.Module):
    """A 1x1 expansion, a depthwise 3x3 convolution and a 1x1 projection, with a shortcut if the shape is kept."""

    features: int
    strides: int
    expansion: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """Returns the block's output."""
        channels = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = ConvNorm(channels, 1, dtype=self.dtype, name="expand")(y)
        y = ConvNorm(channels, 3, self.strides, groups=channels, dtype=self.dtype, name="depthwise")(y)
        y = ConvNorm(self.features, 1, linear=True, dtype=self.dtype, name="project")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """The backbone: from normalized RGB images to feature maps of four strides.

    A side of n pixels becomes ceil(n / stride) cells. Blocks are named `block_1` to `block_17` after
    torchvision's `features.1` to `features.17`.

    Attributes:
        with_head: also return 'head', the 1280 channels at stride 32 that torchvision's classifier reads.
        dtype: dtype of the convolutions; None is float32 for float32 images.
    """

    with_head: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B _ _ _"]]:
        """Returns the maps 'res2' to 'res5' of strides 4 to 32 and `OUT_CHANNELS` channels."""
        x = ConvNorm(STEM_CHANNELS, 3, 2, dtype=self.dtype, name="stem")(images)
        features: dict[str, Array] = {}
        number = 0
        for expansion, channels, blocks, stride in STAGES:
            for block in range(blocks):
                number += 1
                strides = stride if block == 0 else 1
                x = InvertedResidual(channels, strides, expansion, self.dtype, name=f"block_{number}")(x)
            features.update({name: x for name, count in OUT_CHANNELS.items() if count == channels})
        if self.with_head:
            features["head"] = ConvNorm(HEAD_CHANNELS, 1, dtype=self.dtype, name="head")(x)
        return features
