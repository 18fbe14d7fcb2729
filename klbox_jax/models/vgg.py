"""The VGG networks of the Faster R-CNN paper: backbones of stride 16 and the box head with two layers.

VGG-16: Simonyan & Zisserman, ICLR 2015, table 1, column D. VGG-CNN-M-1024: Chatfield et al., BMVC 2014,
table 1. All shapes are those of py-faster-rcnn's Caffe definitions, where RoI pooling replaces the last pooling
layer, with 7 x 7 bins over VGG-16 and 6 x 6 bins over VGG-CNN-M-1024.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from klbox_jax.models.convolution import Conv, he_normal_fan_out
from klbox_jax.ops.local_response_norm import local_response_norm


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions; the map of the last one, `conv5_3`, has stride 16.

    Pooling keeps an odd last row or column, like Caffe and unlike torchvision: a side of n pixels becomes
    ceil(n / 16) cells, the same as in torchvision if 16 divides n.

    Attributes:
        stage_features: channels of the five stages.
        stage_convs: number of convolutions of each stage.
        dtype: dtype of the convolutions; None is float32 for float32 images.
    """

    stage_features: tuple[int, ...] = (64, 128, 256, 512, 512)
    stage_convs: tuple[int, ...] = (2, 2, 3, 3, 3)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Returns 'res4', named by its stride as in every backbone; `images` are normalized."""
        x = images
        shapes = zip(self.stage_features, self.stage_convs, strict=True)
        for stage, (features, convs) in enumerate(shapes, start=1):
            if stage > 1:
                x = nn.max_pool(x, (2, 2), (2, 2), padding=((0, x.shape[1] % 2), (0, x.shape[2] % 2)))
            for number in range(1, convs + 1):
                x = nn.relu(Conv(features, dtype=self.dtype, name=f"conv{stage}_{number}")(x))
        return {"res4": x}


class VGGCNNM1024(nn.Module):
    """Five convolutions, the first two with local response normalization and max pooling.

    In Caffe, layers 1 and 2 are padded by 0 and 1, and pooling is not padded. A side of 600 pixels then becomes
    36 cells, and the centre of cell `i` is 9.5 pixels past the centre of its anchors, `16 i + 8`, in both directions.
    Here the layers are the same, but the image is padded so that a side of n pixels becomes ceil(n / 16) cells with
    centres at `16 i + 8.5`. This differs from py-faster-rcnn on purpose.

    Attributes:
        features: channels of the five convolutions.
        dtype: dtype of the convolutions; None is float32 for float32 images.
    """

    features: tuple[int, ...] = (96, 256, 512, 512, 512)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Returns 'res4', named by its stride as in every backbone; `images` are normalized."""

        def strided(x, features, kernel_size, padding, name):
            sides = (kernel_size,) * 2
            init = he_normal_fan_out
            return nn.Conv(features, sides, 2, padding, kernel_init=init, dtype=self.dtype, name=name)(x)

        x = jnp.pad(images, ((0, 0), _margins(images.shape[1]), _margins(images.shape[2]), (0, 0)))
        x = local_response_norm(nn.relu(strided(x, self.features[0], 7, 0, "conv1")))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = local_response_norm(nn.relu(strided(x, self.features[1], 5, 1, "conv2")))
        x = nn.max_pool(x, (3, 3), (2, 2))
        for number, features in enumerate(self.features[2:], start=3):
            x = nn.relu(Conv(features, dtype=self.dtype, name=f"conv{number}")(x))
        return {"res4": x}


def _margins(length: int) -> tuple[int, int]:
    """Returns the padding before and after a side of `length` pixels; N cells read exactly 16 N + 19 pixels."""
    cells = -(-length // 16)
    return 9, 16 * cells + 10 - length


class VGGBoxHead(nn.Module):
    """The fully connected layers `fc6` and `fc7` over the pooled features.

    Inputs are flattened row by row, channels last. In a kernel of Caffe or torch, channels come first, so the reader
    of its weights must permute `fc6`.

    Attributes:
        features: widths of `fc6` and `fc7`: (4096, 4096) for VGG-16, (4096, 1024) for VGG-CNN-M-1024.
        dropout_rate: share of each layer's outputs that training drops; 0.5 in py-faster-rcnn.
        dtype: dtype of the arithmetic; None is that of input and params together.
    """

    features: tuple[int, int] = (4096, 4096)
    dropout_rate: float = 0.5
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, pooled: Float[Array, "n s s c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "n f"]:
        """Returns a vector for each RoI.

        Args:
            pooled: the pooled features.
            key: random key of the dropout; None for no dropout.
        """
        x = pooled.reshape(pooled.shape[0], -1)
        for number, features in enumerate(self.features, start=6):
            init = nn.initializers.he_uniform()
            x = nn.relu(nn.Dense(features, kernel_init=init, dtype=self.dtype, name=f"fc{number}")(x))
            if key is not None:
                x = dropout(x, jax.random.fold_in(key, number), rate=self.dropout_rate)
        return x


def dropout(x: Float[Array, "*n"], key: Key[Array, ""], *, rate: float) -> Float[Array, "*n"]:
    """Sets a share `rate` of the values to zero and scales the others, so that the mean does not change."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)
