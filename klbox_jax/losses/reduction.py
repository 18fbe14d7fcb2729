"""Sums and means over masked rows.

Masked entries are replaced before the sum, so a NaN or an infinity among them does no harm to the value. For
the gradient the inputs of the loss must be made safe as well: a zero cotangent times an infinite derivative
is NaN.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_sum(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Sums `values` where `mask` is True, in float32.

    Args:
        values: any shape.
        mask: of the same rank, broadcast along axes of length 1: `foreground[:, None]` for `[R, 4]` losses.

    Raises:
        ValueError: if the ranks differ, or the mask does not broadcast to the values.
    """
    return jnp.sum(jnp.where(_broadcast(mask, values), values.astype(jnp.float32), 0.0))


def masked_mean(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Averages `values` where `mask` is True, in float32; 0 where the mask is empty.

    Args:
        values: any shape.
        mask: as in `masked_sum`.

    Raises:
        ValueError: as `masked_sum`.
    """
    count = jnp.sum(_broadcast(mask, values))
    return masked_sum(values, mask) / jnp.where(count == 0, 1, count).astype(jnp.float32)


def _broadcast(mask: Array, values: Array) -> Array:
    if mask.ndim != values.ndim:
        raise ValueError(
            f"The mask needs the rank of the values, got {mask.shape} for {values.shape}; "
            "add axes of length 1 where it should broadcast."
        )
    return jnp.broadcast_to(mask, values.shape)
