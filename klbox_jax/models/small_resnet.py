"""A small residual network (He et al., CVPR 2016) with group normalization (Wu & He, ECCV 2018).

For training from random weights.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from klbox_jax.models.convolution import Conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Attributes:
        features: output channels.
        strides: stride of the first convolution and of the shortcut.
        group_size: number of channels with common normalization statistics.
        dtype: dtype of the convolutions and the output; None is that of input and params together.
    """

    features: int
    strides: int
    group_size: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        conv = functools.partial(Conv, self.features, use_bias=False, dtype=self.dtype)
        # Statistics are float32 with every dtype.
        norm = functools.partial(nn.GroupNorm, None, group_size=self.group_size, dtype=self.dtype)
        shortcut = x
        if x.shape[-1] != self.features or self.strides != 1:
            shortcut = conv(kernel_size=1, strides=self.strides, name="shortcut")(x)
            shortcut = norm(name="shortcut_norm")(shortcut)
        x = nn.relu(norm(name="norm1")(conv(kernel_size=3, strides=self.strides, name="conv1")(x)))
        x = conv(kernel_size=3, name="conv2")(x)
        # The residual branch starts at zero: a deep network with random weights starts as a shallow one.
        x = norm(scale_init=nn.initializers.zeros, name="norm2")(x)
        return nn.relu(x + shortcut)


def space_to_depth(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 c2"]:
    """Turns blocks of `side` x `side` pixels into channels; zeros complete the blocks at the bottom and the right."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % side), (0, -x.shape[2] % side), (0, 0)))
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // side, w // side, side * side * c)


class ResNet(nn.Module):
    """A stem of stride 4 and stages `res2`, `res3`, ... of strides 4, 8, ...

    The stem is a 3x3 convolution over 4x4 blocks of pixels, because a convolution over three channels uses few of
    the arithmetic units of any machine.

    Attributes:
        stem_features: channels of the first convolution.
        stage_features: channels of each stage.
        stage_blocks: number of residual blocks of each stage.
        group_size: number of channels with common normalization statistics.
        dtype: dtype of the convolutions and the output; None is float32 for float32 images.
    """

    stem_features: int = 32
    stage_features: tuple[int, ...] = (32, 64, 128, 256)
    stage_blocks: tuple[int, ...] = (2, 2, 2, 2)
    group_size: int = 16
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Returns the feature map of each stage; `images` are normalized."""
        stem = Conv(self.stem_features, kernel_size=3, use_bias=False, dtype=self.dtype, name="stem")
        norm = nn.GroupNorm(None, group_size=self.group_size, dtype=self.dtype, name="stem_norm")
        x = nn.relu(norm(stem(space_to_depth(images, 4))))
        outputs = {}
        for stage, (features, blocks) in enumerate(
            zip(self.stage_features, self.stage_blocks, strict=True), start=2
        ):
            for block in range(blocks):
                strides = 2 if stage > 2 and block == 0 else 1
                name = f"res{stage}_{block}"
                x = BasicBlock(features, strides, self.group_size, self.dtype, name=name)(x)
            outputs[f"res{stage}"] = x
        return outputs
