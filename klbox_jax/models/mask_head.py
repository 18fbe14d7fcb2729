"""The mask head of Mask R-CNN (He et al., ICCV 2017, figure 4, right)."""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from klbox_jax.models.convolution import Conv


class Deconv2x2(nn.Module):
    """Transposed convolution of kernel 2 and stride 2: each cell becomes 2 x 2 cells that no other touches.

    So it is one product. Params: `kernel` [2, 2, C_in, C_out], torch's [C_in, C_out, 2, 2] with its axes
    moved, and `bias` [C_out].

    Attributes:
        features: output channels.
        dtype: dtype of the arithmetic and the output; None is that of input and params together.
    """

    features: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        b, h, w, c = x.shape
        # The variance of detectron2's and torchvision's: their "fan out" counts this kernel's inputs.
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (2, 2, c, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("bhwc,ijcf->bhiwjf", x, kernel).reshape(b, 2 * h, 2 * w, self.features)
        return y + bias[None, None, None, :]


class MaskHead(nn.Module):
    """3x3 convolutions, a deconvolution that doubles the map, and one mask for each class.

    Layers have torchvision's names: `mask_fcn1`, ..., `conv5_mask`, `mask_fcn_logits`.

    Attributes:
        num_classes: K; there is no mask of the background.
        features: channels of every layer but the last.
        num_convs: 3x3 convolutions.
        dtype: dtype of all layers; None is that of input and params together.
    """

    num_classes: int
    features: int = 256
    num_convs: int = 4
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, pooled: Float[Array, "n s s c"]) -> Float[Array, "n k s2 s2"]:
        """Returns the mask logits of each class, float32, at twice the pooled resolution."""
        x = pooled
        for number in range(1, self.num_convs + 1):
            x = nn.relu(Conv(self.features, dtype=self.dtype, name=f"mask_fcn{number}")(x))
        x = nn.relu(Deconv2x2(self.features, self.dtype, name="conv5_mask")(x))
        # detectron2's: all masks start at a probability of one half.
        init = nn.initializers.normal(0.001)
        logits = Conv(
            self.num_classes, kernel_size=1, kernel_init=init, dtype=self.dtype, name="mask_fcn_logits"
        )(x)
        return jnp.moveaxis(logits.astype(jnp.float32), -1, 1)
