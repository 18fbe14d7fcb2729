"""Feature pyramid network (Lin et al., CVPR 2017, section 3)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from klbox_jax.models.convolution import Conv


def upsample_to(x: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b height width c"]:
    """Doubles a map by nearest neighbour and crops it to the size of the finer map, which may be odd."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x[:, :height, :width]


class FPN(nn.Module):
    """Merges the backbone's stages, coarse to fine, into maps with the same number of channels.

    Attributes:
        features: channels of every level.
        levels: the backbone stages that are merged, finest first; level `l` has stride `2 ** l`.
        extra_levels: number of coarser levels, made from the last one by taking every second cell (detectron2's
            `LastLevelMaxPool`).
        dtype: dtype of the convolutions; None is that of input and params together.
    """

    features: int = 256
    levels: tuple[int, ...] = (2, 3, 4, 5)
    extra_levels: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, stages: dict[str, Float[Array, "b _h _w _c"]]
    ) -> dict[str, Float[Array, "b _h2 _w2 c2"]]:
        """Returns `p2`, `p3`, ...; `stages` are the backbone's `res2`, `res3`, ..."""
        outputs = {}
        top = None
        # No ReLU follows, so the gain is 1 (detectron2's `c2_xavier_fill`); He's gain of 2 would double the variance.
        init = nn.initializers.lecun_normal()
        for level in reversed(self.levels):
            lateral = Conv(
                self.features, kernel_size=1, kernel_init=init, dtype=self.dtype, name=f"fpn_lateral{level}"
            )(stages[f"res{level}"])
            top = lateral if top is None else lateral + upsample_to(top, *lateral.shape[1:3])
            outputs[f"p{level}"] = Conv(
                self.features, kernel_size=3, kernel_init=init, dtype=self.dtype, name=f"fpn_output{level}"
            )(top)
        last = self.levels[-1]
        for level in range(last + 1, last + 1 + self.extra_levels):
            outputs[f"p{level}"] = outputs[f"p{level - 1}"][:, ::2, ::2]
        return outputs
