"""Draws random subsets of labelled boxes, with a fixed size and a limited share of positives."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from klbox_jax.ops.matcher import Label
from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class Samples:
    """Rows drawn from a larger set: the positives first, then the negatives, then unused slots.

    Attributes:
        indices: the drawn row; 0 where `valid` is False.
        is_positive: True for a row labelled POSITIVE.
        valid: False for an unused slot; there are some if too few rows are labelled POSITIVE or NEGATIVE.
    """

    indices: Int[AnyArray, "*b s"]
    is_positive: Bool[AnyArray, "*b s"]
    valid: Bool[AnyArray, "*b s"]


def subsample_labels(
    key: PRNGKeyArray, labels: Int[Array, " n"], *, num_samples: int, positive_fraction: float
) -> Samples:
    """Draws `num_samples` POSITIVE or NEGATIVE rows without replacement (detectron2's `subsample_labels`).

    At most floor(num_samples * positive_fraction) of them are positives, drawn uniformly; uniformly drawn
    negatives fill the rest. With too few negatives, slots stay unused: positives above their share do not
    replace negatives.

    Args:
        key: random key; the same key and labels give the same sample.
        labels: values of `Label`; n may be 0.
        num_samples: number of slots of the result, independent of the labels.
        positive_fraction: largest share of positives.

    Returns:
        `Samples` of `num_samples` rows.
    """
    if labels.shape[0] == 0:
        unused = jnp.zeros(num_samples, bool)
        return Samples(indices=unused.astype(jnp.int32), is_positive=unused, valid=unused)
    # One draw is enough: positives are ranked only among positives, negatives only among negatives. top_k is called
    # twice, because XLA on CPU is ten times slower with the two vectors stacked.
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
