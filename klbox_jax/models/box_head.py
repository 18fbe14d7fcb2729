"""The box head: from pooled features to class, edges and the log variance of each edge."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from klbox_jax.structures import BoxPredictions


class BoxHead(nn.Module):
    """Two fully connected layers over the pooled features.

    Attributes:
        features: width of each layer.
    """

    features: int = 1024

    @nn.compact
    def __call__(self, pooled: Float[Array, "n s s c"]) -> Float[Array, "n f"]:
        x = pooled.reshape(pooled.shape[0], -1)
        x = nn.relu(nn.Dense(self.features, kernel_init=nn.initializers.he_uniform(), name="fc1")(x))
        return nn.relu(nn.Dense(self.features, kernel_init=nn.initializers.he_uniform(), name="fc2")(x))


class BoxPredictor(nn.Module):
    """Linear layers for the class, the corner offsets and, for a probabilistic loss, their log variances.

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
            rows = nn.Dense(num_boxes * 4, kernel_init=normal(stddev), name=name)(x)
            return rows.reshape(-1, num_boxes, 4).astype(jnp.float32)

        logits = nn.Dense(self.num_classes + 1, kernel_init=normal(0.01), name="cls_score")(x)
        return BoxPredictions(
            class_logits=logits.astype(jnp.float32),
            box_deltas=boxes("bbox_pred", 0.001),
            box_log_vars=boxes("bbox_log_var", 0.0001) if self.predict_log_vars else None,
        )
