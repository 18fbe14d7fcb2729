"""The box head: from pooled features to class, edges and the log variance of each edge."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from klbox_jax.structures import BoxPredictions


class BoxHead(nn.Module):
    """Two fully connected layers over the pooled features.

    Attributes:
        features: width of each layer.
        dtype: dtype of the arithmetic; None is that of input and params together.
    """

    features: int = 1024
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, pooled: Float[Array, "n s s c"]) -> Float[Array, "n f"]:
        x = pooled.reshape(pooled.shape[0], -1)
        for name in ("fc1", "fc2"):
            init = nn.initializers.he_uniform()
            x = nn.relu(nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name=name)(x))
        return x


class BoxPredictor(nn.Module):
    """Linear layers for the class, the corner offsets and, for a probabilistic loss, their log variances.

    The products are float32, whatever the dtype of the features: bfloat16 has eight bits, and scores that are
    ranked would have ties.

    Attributes:
        num_classes: K, without the background.
        class_agnostic: one box for all classes instead of one for each.
        predict_log_vars: adds the log-variance branch (He et al. 2019, section 3.1), initialised with
            N(0, 1e-4), so that training starts at sigma = 1.
    """

    num_classes: int
    class_agnostic: bool
    predict_log_vars: bool

    @nn.compact
    def __call__(self, x: Float[Array, "n f"]) -> BoxPredictions:
        num_boxes = 1 if self.class_agnostic else self.num_classes
        normal = nn.initializers.normal

        def boxes(name, stddev):
            rows = nn.Dense(num_boxes * 4, kernel_init=normal(stddev), dtype=jnp.float32, name=name)(x)
            return rows.reshape(-1, num_boxes, 4)

        classes = self.num_classes + 1
        logits = nn.Dense(classes, kernel_init=normal(0.01), dtype=jnp.float32, name="cls_score")(x)
        return BoxPredictions(
            class_logits=logits,
            box_deltas=boxes("bbox_pred", 0.001),
            box_log_vars=boxes("bbox_log_var", 0.0001) if self.predict_log_vars else None,
        )
