"""Local response normalization across channels (Krizhevsky et al., NeurIPS 2012, section 3.3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Values of both layers of VGG-CNN-M-1024, from its Caffe definition in py-faster-rcnn.
SIZE = 5
ALPHA = 5e-4
BETA = 0.75
K = 2.0


def local_response_norm(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Divides each channel by `(K + ALPHA / SIZE * sum of squares of the SIZE channels around it) ** BETA`.

    Channels before the first and after the last count as zero. Agrees with Caffe and torch, which divide alpha
    by the size of the window; the paper does not. The arithmetic is float32.
    """
    channels = x.shape[-1]
    squares = jnp.square(x.astype(jnp.float32))
    padded = jnp.pad(squares, [(0, 0)] * (x.ndim - 1) + [(SIZE // 2, SIZE // 2)])
    total = sum(padded[..., start : start + channels] for start in range(SIZE))
    return (x * (K + ALPHA / SIZE * total) ** -BETA).astype(x.dtype)
