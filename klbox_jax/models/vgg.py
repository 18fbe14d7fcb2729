"""The VGG networks that Faster R-CNN was published with: features of stride 16, and the two layers over RoIs.

VGG-16: Simonyan & Zisserman, ICLR 2015, table 1, column D. VGG-CNN-M-1024: Chatfield et al., BMVC 2014,
table 1. Shapes of both as py-faster-rcnn's Caffe definitions have them, where the last pooling layer gives
way to RoI pooling, of 7 x 7 bins over VGG-16 and of 6 x 6 over the other.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from klbox_jax.models.convolution import Conv, he_normal_fan_out
from klbox_jax.ops.local_response_norm import local_response_norm


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions; the map of the last, `conv5_3`, has stride 16.

    Pooling keeps a last odd row or column, as Caffe does and torchvision does not: a side of n pixels becomes
    ceil(n / 16) cells, the same as torchvision's where 16 divides n.

    Attributes:
        stage_features: channels of the five stages.
        stage_convs: convolutions of each.
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

    Caffe's layers 1 and 2 are padded by 0 and 1, and pooling is not padded. Taken as they are, a side of
    600 pixels becomes 36 cells, and cell `i` is centred 9.5 pixels beyond the centre of its anchors, which
    is at `16 i + 8`. Here the layers are the same, over an image padded so that a side of n pixels becomes
    ceil(n / 16) cells and cell `i` is centred at `16 i + 8.5`. That differs from py-faster-rcnn on purpose.

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
    """Returns the padding before and after a side: N cells read exactly 16 N + 19 pixels."""
    cells = -(-length // 16)
    return 9, 16 * cells + 10 - length


class VGGBoxHead(nn.Module):
    """The fully connected layers `fc6` and `fc7` over the pooled features.

    Inputs are flattened row by row, channels last. A Caffe or torch kernel of `fc6` counts channels first:
    its reader has to permute it.

    Attributes:
        features: width of `fc6` and `fc7`: (4096, 4096) for VGG-16, (4096, 1024) for VGG-CNN-M-1024.
        dropout_rate: share of each layer's outputs that training drops; py-faster-rcnn has 0.5.
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
            key: draws what training drops; None drops nothing.
        """
        x = pooled.reshape(pooled.shape[0], -1)
        for number, features in enumerate(self.features, start=6):
            init = nn.initializers.he_uniform()
            x = nn.relu(nn.Dense(features, kernel_init=init, dtype=self.dtype, name=f"fc{number}")(x))
            if key is not None:
                x = dropout(x, jax.random.fold_in(key, number), rate=self.dropout_rate)
        return x


def dropout(x: Float[Array, "*n"], key: Key[Array, ""], *, rate: float) -> Float[Array, "*n"]:
    """Sets a share `rate` of the values to zero, and scales the rest so that the mean stays."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)
