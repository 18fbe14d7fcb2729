"""Losses whose prediction is a Gaussian, with the exact squared error; shapes and space as in `box_regression`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from klbox_jax.losses.box_regression import box_loss_operands, kl_variance_of, smooth_l1
from klbox_jax.losses.log_variance import clamp_log_var


def gaussian_nll(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes `exp(-alpha) e^2 / 2 + alpha / 2`: negative log-likelihood of a Gaussian, without its `log(2 pi) / 2`.

    The inner branch of `kl_loss` for every error, so that the loss stays a likelihood: the best variance is
    `e^2` throughout, and a far outlier weighs with its square. Kendall and Gal (2017).
    probdet's loss of that name for a diagonal covariance halves a smooth-L1 error instead.

    Args:
        deltas: predicted coded offsets, the mean.
        log_vars: predicted alpha = log sigma^2 of the coded offsets, same shape.
        targets: coded offsets of the matched ground truth, same shape.
        clamp: range of alpha; see `clamp_log_var`.

    Returns:
        Same shape; may be negative.

    Raises:
        ValueError: if the shapes differ (nothing is broadcast), or the range is empty.
    """
    deltas, log_vars, targets = box_loss_operands(deltas=deltas, log_vars=log_vars, targets=targets)
    alpha = clamp_log_var(log_vars, low=clamp[0], high=clamp[1])
    return 0.5 * jnp.exp(-alpha) * (deltas - targets) ** 2 + 0.5 * alpha


def beta_nll(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    beta: float = 0.5,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes `sigma^(2 beta) * gaussian_nll`, the first factor without gradient (Seitzer et al., ICLR 2022).

    The likelihood scales the gradient of the mean by `1 / sigma^2`, so hard examples stop being learned once
    they have a large variance. The factor removes a part of that scaling: at `beta = 0` the loss is
    `gaussian_nll`, at `beta = 1` the mean is trained as by `e^2 / 2`. The best variance stays `e^2`. The
    values of two steps cannot be compared: the factor changes with the prediction.

    Other arguments and errors as in `gaussian_nll`.
    """
    weight = jax.lax.stop_gradient(kl_variance_of(log_vars, clamp=clamp) ** beta)
    return weight * gaussian_nll(deltas, log_vars, targets, clamp=clamp)


def gaussian_kl(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    label_stds: Float[Array, "..."],
    *,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes the KL divergence of the predicted Gaussian from a Gaussian label.

    It is never negative, and zero where the two agree.
    `log(s_p / s_l) + (s_l^2 + e^2) / (2 s_p^2) - 1/2`, label first. Its best variance is `s_l^2 + e^2`:
    the noise of the label is a floor. With `u = log(s_l^2 / s_p^2)` it is `(e^u - 1 - u) / 2 + e^2 / (2 s_p^2)`,
    a sum of two terms that are not negative, which is how it is computed: near agreement it is off by a rounding of
    `u` at most.

    Args:
        deltas, log_vars, targets, clamp: as in `gaussian_nll`.
        label_stds: s_l, standard deviation of the targets, coded like them; positive.

    Returns:
        Same shape.

    Raises:
        ValueError: if the shapes differ (nothing is broadcast), or the range is empty.
    """
    deltas, log_vars, targets, label_stds = box_loss_operands(
        deltas=deltas, log_vars=log_vars, targets=targets, label_stds=label_stds
    )
    alpha = clamp_log_var(log_vars, low=clamp[0], high=clamp[1])
    log_ratio = 2.0 * jnp.log(label_stds) - alpha
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio) + 0.5 * jnp.exp(-alpha) * (deltas - targets) ** 2


def direct_moment_matching(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    beta: float = 1.0,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes `smooth_l1(e) + smooth_l1(exp(alpha) - e^2)`: the variance is fitted to the squared error (probdet).

    Harakeh and Waslander (ICLR 2021), as in their code for a diagonal covariance but for one thing: there
    the second term trains the mean as well, here it sees the squared error as a constant. With the gradient
    the mean of a box with `|e| < 1` moves by `e (1 - 2 min(exp(alpha) - e^2, 1))` at `beta = 1`, that is,
    away from the label wherever the predicted variance is larger than `e^2` by a half, as it is when
    training starts. (probdet's own runs have `beta = 0`, where only errors above 1/2 are pushed away.)

    For a fixed error the best variance is `e^2`. For the errors of many boxes that look alike it is a robust
    location of their squares, not their variance: the median at `beta = 0` (0.45 of a Gaussian's variance),
    the mean only for a large beta.

    Args:
        deltas, log_vars, targets, clamp: as in `gaussian_nll`.
        beta: of both smooth-L1 terms.

    Returns:
        Same shape, never negative.

    Raises:
        ValueError: if the shapes differ, beta is negative, or the range is empty.
    """
    deltas, log_vars, targets = box_loss_operands(deltas=deltas, log_vars=log_vars, targets=targets)
    variances = jnp.exp(clamp_log_var(log_vars, low=clamp[0], high=clamp[1]))
    squared_errors = jax.lax.stop_gradient((deltas - targets) ** 2)
    return smooth_l1(deltas, targets, beta=beta) + smooth_l1(variances, squared_errors, beta=beta)
