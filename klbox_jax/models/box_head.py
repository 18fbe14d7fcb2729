"""The box head: from pooled features to one vector for each RoI."""

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


class BoxHead(nn.Module):
    """Two fully connected layers over the pooled features.

    Attributes:
        features: width of each layer.
        dtype: dtype of the arithmetic; None is that of input and params together.
    """

    features: int = 1024
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, pooled: Float[Array, "n s s c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "n f"]:
        """Returns a vector for each RoI; `key` is not used, as there is no dropout."""
        del key
        x = pooled.reshape(pooled.shape[0], -1)
        for name in ("fc1", "fc2"):
            init = nn.initializers.he_uniform()
            x = nn.relu(nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name=name)(x))
        return x
