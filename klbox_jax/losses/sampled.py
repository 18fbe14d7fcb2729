"""A loss that draws samples from the predicted distribution; shapes and space as in `box_regression`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from klbox_jax.losses.box_regression import box_loss_operands, smooth_l1
from klbox_jax.losses.log_variance import clamp_log_var


def energy_score(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    key: Key[Array, ""],
    *,
    num_samples: int,
    beta: float = 0.0,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes `(2 / M) sum |z_i - t| - (1 / M) sum |z_i - z_(i+1)|` over draws z of the predicted Gaussian.

    The energy score of Harakeh and Waslander (ICLR 2021; probdet) for a diagonal covariance, where the score of a
    box is the sum over its edges: M + 1 draws `deltas + sigma * noise` for each edge, so that mean and
    variance both have a gradient. With `beta = 0` the expectation is twice the Gaussian's continuous ranked
    probability score, a proper score: it is lowest, on average, where the prediction is the truth. It grows
    like `2 |e|`, not `e^2`.

    Args:
        deltas: predicted coded offsets, the mean.
        log_vars: predicted alpha = log sigma^2 of the coded offsets, same shape.
        targets: coded offsets of the matched ground truth, same shape.
        key: draws the noise, independent for each entry.
        num_samples: M; memory and time grow with it.
        beta: replaces both absolute values by `smooth_l1`, as probdet does with the box loss's own beta.
        clamp: range of alpha; see `clamp_log_var`.

    Returns:
        Same shape; the value for few samples may be negative.

    Raises:
        ValueError: if the shapes differ, `num_samples` is below 1, beta is negative, or the range is empty.
    """
    deltas, log_vars, targets = box_loss_operands(deltas=deltas, log_vars=log_vars, targets=targets)
    if num_samples < 1:
        raise ValueError(f"energy_score needs num_samples >= 1, got {num_samples}.")
    sigma = jnp.exp(0.5 * clamp_log_var(log_vars, low=clamp[0], high=clamp[1]))[None]
    noise = sigma * jax.random.normal(key, (num_samples + 1, *deltas.shape), deltas.dtype)
    # The mean cancels between two draws, so a large one cannot round the spread away.
    to_target = smooth_l1(noise[:-1], jnp.broadcast_to(targets - deltas, noise[:-1].shape), beta=beta)
    spread = smooth_l1(noise[:-1], noise[1:], beta=beta)
    return jnp.mean(2.0 * to_target - spread, axis=0)
