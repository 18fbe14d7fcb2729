"""A random subset of labelled boxes, of a fixed size and a bounded share of positives."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from klbox_jax.ops.matcher import Label
from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class Samples:
    """Rows drawn from a larger set: the positives first, then the negatives, then unused rows.

    Attributes:
        indices: the row drawn; 0 where `valid` is False.
        is_positive: the row is labelled POSITIVE.
        valid: False where too few rows were labelled POSITIVE or NEGATIVE.
    """

    indices: Int[AnyArray, "*b s"]
    is_positive: Bool[AnyArray, "*b s"]
    valid: Bool[AnyArray, "*b s"]


def subsample_labels(
    key: PRNGKeyArray, labels: Int[Array, " n"], *, num_samples: int, positive_fraction: float
) -> Samples:
    """Draws `num_samples` rows, all POSITIVE or NEGATIVE, without replacement.

    At most floor(num_samples * positive_fraction) of them are positives, drawn uniformly; negatives, drawn
    uniformly, fill the rest. Where negatives are too few the sample stays short: positives beyond their share
    do not take the place of negatives (detectron2's `subsample_labels`).

    Args:
        key: random key; the same key and labels give the same sample.
        labels: values of `Label`.
        num_samples: size of the result, whatever the labels are.
        positive_fraction: largest share of positives.

    Returns:
        `Samples` of `num_samples` rows.
    """
    # One draw serves both: positives are ranked among positives only, negatives among negatives. Two calls of
    # top_k, since XLA on CPU is ten times slower on the two vectors stacked.
    priority = jax.random.uniform(key, labels.shape)
    is_positive, is_negative = labels == Label.POSITIVE, labels == Label.NEGATIVE
    num_drawn = min(num_samples, labels.shape[0])
    positives = jax.lax.top_k(jnp.where(is_positive, priority, -1.0), num_drawn)[1]
    negatives = jax.lax.top_k(jnp.where(is_negative, priority, -1.0), num_drawn)[1]

    num_positives = jnp.minimum(jnp.sum(is_positive), int(num_samples * positive_fraction))
    num_negatives = jnp.minimum(jnp.sum(is_negative), num_samples - num_positives)
    slot = jnp.arange(num_samples)
    takes_positive = slot < num_positives
    valid = slot < num_positives + num_negatives
    indices = jnp.where(
        takes_positive,
        positives[jnp.clip(slot, 0, num_drawn - 1)],
        negatives[jnp.clip(slot - num_positives, 0, num_drawn - 1)],
    )
    return Samples(indices=jnp.where(valid, indices, 0), is_positive=takes_positive, valid=valid)
