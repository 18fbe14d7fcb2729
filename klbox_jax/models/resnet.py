"""ResNet-50 and ResNet-101 with frozen batch norm, for detectors that start from pretrained weights.

He et al., CVPR 2016, table 1. There are two variants with the same shapes: the original halves the map in the first
1x1 convolution of a stage, torchvision in the 3x3 convolution ("ResNet v1.5"). Padding is torch's, so a side of n
pixels becomes ceil(n / stride) cells.
"""

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from klbox_jax.models.convolution import Conv
from klbox_jax.models.normalization import FrozenBatchNorm
from klbox_jax.ops.relu import relu


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the first two have a quarter of the output channels.

    Attributes:
        features: output channels.
        strides: stride of the block.
        stride_in_1x1: the first 1x1 convolution has the stride if True, the 3x3 convolution if False.
        dtype: dtype of the convolutions; None is that of the input and the params together.
    """

    features: int
    strides: int
    stride_in_1x1: bool
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        def conv(x, features, kernel_size, strides, name):
            return Conv(features, kernel_size, strides, use_bias=False, dtype=self.dtype, name=name)(x)

        width = self.features // 4
        first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
        shortcut = x
        if x.shape[-1] != self.features or self.strides != 1:
            shortcut = conv(x, self.features, 1, self.strides, "shortcut")
            shortcut = FrozenBatchNorm(name="shortcut_norm")(shortcut)
        x = relu(FrozenBatchNorm(name="norm1")(conv(x, width, 1, first, "conv1")))
        x = relu(FrozenBatchNorm(name="norm2")(conv(x, width, 3, second, "conv2")))
        x = FrozenBatchNorm(name="norm3")(conv(x, self.features, 1, 1, "conv3"))
        return relu(x + shortcut)


class BottleneckResNet(nn.Module):
    """A stem of stride 4 and the stages `res2` to `res5` of strides 4 to 32.

    Blocks are named `res2_0`, `res2_1`, ... after torchvision's `layer1.0`, `layer1.1`, ...

    Attributes:
        stage_blocks: number of blocks of each stage: (3, 4, 6, 3) for 50 layers, (3, 4, 23, 3) for 101.
        stage_features: output channels of each stage.
        stem_features: channels of the first convolution.
        stride_in_1x1: True for the original weights (MSRA's, converted by Detectron), False for torchvision's.
        out_stages: the returned stages, finest first; stages after the last of them are not built. A C4 detector has
            ("res4",) and the remaining stage in `Res5Head`.
        dtype: dtype of the convolutions; None is float32 for float32 images.
    """

    stage_blocks: tuple[int, ...] = (3, 4, 6, 3)
    stage_features: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_features: int = 64
    stride_in_1x1: bool = False
    out_stages: tuple[str, ...] = ("res2", "res3", "res4", "res5")
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Returns the map of each of `out_stages`; `images` are normalized."""
        x = Conv(self.stem_features, 7, 2, use_bias=False, dtype=self.dtype, name="stem")(images)
        x = relu(FrozenBatchNorm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        outputs = {}
        shapes = zip(self.stage_features, self.stage_blocks, strict=True)
        for stage, (features, blocks) in enumerate(shapes, start=2):
            for block in range(blocks):
                strides = 2 if stage > 2 and block == 0 else 1
                x = Bottleneck(features, strides, self.stride_in_1x1, self.dtype, name=f"res{stage}_{block}")(
                    x
                )
            if f"res{stage}" in self.out_stages:
                outputs[f"res{stage}"] = x
            if f"res{stage}" == self.out_stages[-1]:
                break
        return outputs


class Res5Head(nn.Module):
    """The last stage of the network as the box head of a C4 detector (He et al. 2016, appendix A).

    It halves the pooled map, in ResNet-50 from 14 x 14 x 1024 to 7 x 7 x 2048, and takes the mean over the map. Its
    blocks have the names of the backbone's: `res5_0`, ...

    Attributes:
        blocks: number of blocks.
        features: output channels.
        stride_in_1x1: the same as in the backbone.
        dtype: dtype of the convolutions.
    """

    blocks: int = 3
    features: int = 2048
    stride_in_1x1: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, pooled: Float[Array, "n s s c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "n c2"]:
        """Returns a vector for each RoI; `key` is not used, as there is no dropout."""
        del key
        x = pooled
        for block in range(self.blocks):
            strides = 2 if block == 0 else 1
            x = Bottleneck(self.features, strides, self.stride_in_1x1, self.dtype, name=f"res5_{block}")(x)
        return x.mean(axis=(1, 2))
