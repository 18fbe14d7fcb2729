"""What every box loss asks of its arrays: one shape, one float type."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def box_loss_operands(**arrays: Float[Array, "..."]) -> tuple[Array, ...]:
    """The arrays, in order, in their common float type, which is float32 at least.

    Raises:
        ValueError: if the shapes differ; nothing is broadcast.
    """
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"A box loss needs arrays of one shape, got {shapes}; gather the matched class first."
        )
    dtype = jnp.result_type(jnp.float32, *arrays.values())
    return tuple(array.astype(dtype) for array in arrays.values())
