"""Losses whose prediction is a Laplace distribution; shapes and space as in `box_regression`.

The head's output is `alpha = log b^2`, b the scale, so that zero is a scale of 1 and the clamp bounds b as it
bounds a Gaussian's sigma. The variance of the distribution is `2 b^2 = 2 exp(alpha)`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from klbox_jax.losses.box_regression import box_loss_operands
from klbox_jax.losses.log_variance import clamp_log_var


def laplace_nll(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes `|e| / b + log(2 b)`: negative log-likelihood of a Laplace distribution, constants included.

    As in Meyer and Thakurdesai (2019). The best scale for a fixed error is `|e|`. At an exact hit the gradient of the
    mean is not 0 but `1 / b`: JAX takes 1 for the derivative of `abs` at 0.

    Args:
        deltas: predicted coded offsets, the mean.
        log_vars: predicted alpha = log b^2 of the coded offsets, same shape.
        targets: coded offsets of the matched ground truth, same shape.
        clamp: range of alpha; see `clamp_log_var`.

    Returns:
        Same shape; may be negative.

    Raises:
        ValueError: if the shapes differ (nothing is broadcast), or the range is empty.
    """
    deltas, log_vars, targets = box_loss_operands(deltas=deltas, log_vars=log_vars, targets=targets)
    alpha = clamp_log_var(log_vars, low=clamp[0], high=clamp[1])
    return jnp.exp(-0.5 * alpha) * jnp.abs(deltas - targets) + 0.5 * alpha + math.log(2.0)


def lasernet_kl(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    label_stds: Float[Array, "..."],
    *,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes the KL divergence of the predicted Laplace distribution from a Laplace label.

    `log(b_p / b_l) + (b_l exp(-|e| / b_l) + |e|) / b_p - 1`, label first (Meyer and Thakurdesai 2019); the
    Learning-Deep-Learning note leaves out the absolute value inside `exp`. Never negative, zero where the two
    agree, and there, unlike the likelihood's, the gradient of the mean, `sign(e) (1 - exp(-|e| / b_l)) /
    b_p`, goes to zero. The best scale for a fixed error is `b_l exp(-|e| / b_l) + |e|`, which is b_l at
    least.

    With `r = b_l / b_p` and `x = |e| / b_l` it is `(r - 1 - log r) + r (exp(-x) - 1 + x)`, a sum of two terms
    that are not negative, which is how it is computed: near agreement it is off by a rounding of `log r` and `x` at
    most, and nothing overflows for a small b_l.

    Args:
        deltas, log_vars, targets, clamp: as in `laplace_nll`.
        label_stds: standard deviation of the targets, coded like them; positive. A Laplace distribution has
            that of `b_l = std / sqrt(2)`.

    Returns:
        Same shape.

    Raises:
        ValueError: if the shapes differ (nothing is broadcast), or the range is empty.
    """
    deltas, log_vars, targets, label_stds = box_loss_operands(
        deltas=deltas, log_vars=log_vars, targets=targets, label_stds=label_stds
    )
    alpha = clamp_log_var(log_vars, low=clamp[0], high=clamp[1])
    label_scales = label_stds / math.sqrt(2.0)
    log_ratio = jnp.log(label_scales) - 0.5 * alpha
    x = jnp.abs(deltas - targets) / label_scales
    return (jnp.expm1(log_ratio) - log_ratio) + jnp.exp(log_ratio) * (jnp.expm1(-x) + x)
