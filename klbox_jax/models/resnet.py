"""A small residual network with group normalization, for training from random weights.

He et al., CVPR 2016, and Wu & He, ECCV 2018.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from klbox_jax.models.convolution import Conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Attributes:
        features: output channels.
        strides: of the first convolution, and of the shortcut.
        group_size: channels that share their normalization statistics.
    """

    features: int
    strides: int
    group_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        shortcut = x
        if x.shape[-1] != self.features or self.strides != 1:
            shortcut = Conv(
                self.features, kernel_size=1, strides=self.strides, use_bias=False, name="shortcut"
            )(x)
            shortcut = nn.GroupNorm(None, group_size=self.group_size, name="shortcut_norm")(shortcut)
        x = Conv(self.features, kernel_size=3, strides=self.strides, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.GroupNorm(None, group_size=self.group_size, name="norm1")(x))
        x = Conv(self.features, kernel_size=3, use_bias=False, name="conv2")(x)
        # The residual branch starts at zero: a deep network of random weights begins as a shallow one.
        zeros = nn.initializers.zeros
        x = nn.GroupNorm(None, group_size=self.group_size, scale_init=zeros, name="norm2")(x)
        return nn.relu(x + shortcut)


def space_to_depth(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 c2"]:
    """Turns blocks of `side` x `side` pixels into channels; pads bottom and right to whole blocks with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % side), (0, -x.shape[2] % side), (0, 0)))
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // side, w // side, side * side * c)


class ResNet(nn.Module):
    """A stem of stride 4 and stages `res2`, `res3`, ... of strides 4, 8, ...

    The stem is a 3x3 convolution over 4x4 blocks of pixels: a convolution over three channels leaves most of
    the arithmetic units of any machine idle.

    Attributes:
        stem_features: channels of the first convolution.
        stage_features: channels of each stage.
        stage_blocks: residual blocks of each stage.
        group_size: channels that share their normalization statistics.
    """

    stem_features: int = 32
    stage_features: tuple[int, ...] = (32, 64, 128, 256)
    stage_blocks: tuple[int, ...] = (2, 2, 2, 2)
    group_size: int = 16

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Returns the feature map of each stage; `images` are normalized."""
        x = Conv(self.stem_features, kernel_size=3, use_bias=False, name="stem")(space_to_depth(images, 4))
        x = nn.relu(nn.GroupNorm(None, group_size=self.group_size, name="stem_norm")(x))
        outputs = {}
        for stage, (features, blocks) in enumerate(
            zip(self.stage_features, self.stage_blocks, strict=True), start=2
        ):
            for block in range(blocks):
                strides = 2 if stage > 2 and block == 0 else 1
                x = BasicBlock(features, strides, self.group_size, name=f"res{stage}_{block}")(x)
            outputs[f"res{stage}"] = x
        return outputs
