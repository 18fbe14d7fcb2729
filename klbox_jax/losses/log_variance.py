"""Clamping of predicted log variances, the same in the loss, in decoding and in voting."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def clamp_log_var(
    log_vars: Float[Array, "..."], *, low: float = -7.0, high: float = 7.0
) -> Float[Array, "..."]:
    """Clips log-variances to `[low, high]`, with a gradient that leads back into the range.

    A plain clip has no gradient outside the range, so an output that once left it would stay there. Here a
    cotangent passes inside the range, and outside it where a descent step moves the value back: a positive
    one above `high`, a negative one below `low`. Reverse mode only.

    Args:
        log_vars: alpha = log sigma^2, any shape, +-inf included.
        low, high: the range, with its ends. -7 to 7 is the range of probdet (Harakeh and Waslander 2021).

    Raises:
        ValueError: if the range is empty.
    """
    if not low < high:
        raise ValueError(f"The log-variance range needs low < high, got low={low} and high={high}.")
    return _clamp(log_vars, low, high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _clamp(log_vars: Array, low: float, high: float) -> Array:
    return jnp.clip(log_vars, low, high)


def _clamp_forward(log_vars: Array, low: float, high: float) -> tuple[Array, Array]:
    return jnp.clip(log_vars, low, high), log_vars


def _clamp_backward(low: float, high: float, log_vars: Array, cotangent: Array) -> tuple[Array]:
    points_out = ((log_vars > high) & (cotangent < 0)) | ((log_vars < low) & (cotangent > 0))
    return (jnp.where(points_out, 0.0, cotangent),)


_clamp.defvjp(_clamp_forward, _clamp_backward)
