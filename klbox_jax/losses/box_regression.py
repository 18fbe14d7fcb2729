"""Smooth L1, L1 and the KL losses of He et al. (CVPR 2019), for labels without noise.

Here and in the sibling modules (`gaussian`, `laplace`, `sampled`) a loss is elementwise and unreduced:
`[..., 4]` in, `[..., 4]` out, float32, or float64 where an input is. Offsets and log-variances live in the
space of the box coder (offset over the reference's side, times the coder's weight), so an error of 1 under the
corner coder's weight 10 is a tenth of the side. `e` is the error, `alpha` the log-variance after
`clamp_log_var`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from klbox_jax.losses.log_variance import clamp_log_var


def smooth_l1(
    deltas: Float[Array, "..."], targets: Float[Array, "..."], *, beta: float = 1.0
) -> Float[Array, "..."]:
    """Computes the Huber loss divided by beta: `e^2 / (2 beta)` up to `|e| = beta`, `|e| - beta / 2` beyond.

    Agrees with detectron2's `smooth_l1_loss`, where `beta=0` is the plain absolute error too.

    Args:
        deltas: predicted coded offsets.
        targets: coded offsets of the matched ground truth, same shape.
        beta: error at which the quadratic part ends.

    Returns:
        Same shape.

    Raises:
        ValueError: if the shapes differ, or beta is negative.
    """
    deltas, targets = box_loss_operands(deltas=deltas, targets=targets)
    if beta < 0:
        raise ValueError(f"smooth_l1 needs beta >= 0, got {beta}.")
    error = jnp.abs(deltas - targets)
    if beta == 0:
        return error
    # One product for both pieces: no branch whose square could overflow.
    quadratic = jnp.minimum(error, beta)
    return quadratic * (error - 0.5 * quadratic) / beta


def l1(deltas: Float[Array, "..."], targets: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `|e|`, which is `smooth_l1` at `beta=0`; same arguments and errors."""
    return smooth_l1(deltas, targets, beta=0.0)


def kl_loss(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes the KL loss of He et al. (CVPR 2019, section 3.2): `exp(-alpha) * smooth_l1(beta=1) + alpha / 2`.

    The label is a Dirac delta, the prediction a Gaussian of mean `deltas` and variance `exp(alpha)`. Their
    KL divergence is `e^2 / (2 sigma^2) + log(sigma^2) / 2` plus two constant terms: `log(2 pi) / 2` and the
    label's entropy. Without these it is no longer a distance and **may be negative**:
    where the error and the predicted sigma are both small, `log(sigma^2) / 2` is far below zero. Beyond
    `|e| = 1` the paper replaces `e^2 / 2` by `|e| - 1/2`, as smooth L1 does. At `alpha = 0` the loss is
    smooth L1.

    For a fixed error the best variance is `e^2` if `|e| <= 1` and `2 |e| - 1` beyond, and the loss there is
    `1/2 + log(sigma^2) / 2`.

    The official Caffe2 code spreads the same loss over three blobs so that each part trains only the box or
    only alpha. Its gradients add up to the gradient of this one expression, but its logged total contains
    the smooth-L1 term twice; ours contains it once. The official code does not clamp alpha.

    Args:
        deltas: predicted coded offsets.
        log_vars: predicted alpha = log sigma^2 of the coded offsets, same shape.
        targets: coded offsets of the matched ground truth, same shape.
        clamp: range of alpha; see `clamp_log_var` for the gradient outside it.

    Returns:
        Same shape; value and gradient are finite for any alpha.

    Raises:
        ValueError: if the shapes differ (nothing is broadcast), or the range is empty.
    """
    deltas, log_vars, targets = box_loss_operands(deltas=deltas, log_vars=log_vars, targets=targets)
    alpha = clamp_log_var(log_vars, low=clamp[0], high=clamp[1])
    return jnp.exp(-alpha) * smooth_l1(deltas, targets) + 0.5 * alpha


def kl_loss_piecewise(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes `kl_loss` in the two branches in which the paper (section 3.2) prints it; the same numbers.

    `exp(-alpha) e^2 / 2 + alpha / 2` where `|e| <= 1`, `exp(-alpha) (|e| - 1/2) + alpha / 2` beyond.
    Arguments and errors as in `kl_loss`.
    """
    deltas, log_vars, targets = box_loss_operands(deltas=deltas, log_vars=log_vars, targets=targets)
    alpha = clamp_log_var(log_vars, low=clamp[0], high=clamp[1])
    error = targets - deltas
    is_small = jnp.abs(error) <= 1
    # The square of a large error may overflow, and zero times infinity would be its gradient.
    small_error = jnp.where(is_small, error, 0.0)
    small = jnp.exp(-alpha) * small_error**2 / 2 + alpha / 2
    large = jnp.exp(-alpha) * (jnp.abs(error) - 0.5) + alpha / 2
    return jnp.where(is_small, small, large)


def kl_loss_note(
    deltas: Float[Array, "..."],
    log_vars: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    clamp: tuple[float, float] = (-7.0, 7.0),
) -> Float[Array, "..."]:
    """Computes `exp(-alpha) * smooth_l1(beta=1) + alpha`, the form of the Learning-Deep-Learning note, a typo.

    The note on KL Loss writes `+ alpha` where the paper's two branches have `+ alpha / 2`. It is here to
    show what the typo costs: the derivative `1 - exp(-alpha) smooth_l1` vanishes at `sigma^2 = smooth_l1(e)`,
    which is `e^2 / 2` if `|e| <= 1` and `|e| - 1/2` beyond, half the best variance of `kl_loss`. A head
    trained with it is overconfident by a factor of sqrt(2) in sigma. Arguments and errors as in `kl_loss`.
    """
    deltas, log_vars, targets = box_loss_operands(deltas=deltas, log_vars=log_vars, targets=targets)
    alpha = clamp_log_var(log_vars, low=clamp[0], high=clamp[1])
    return jnp.exp(-alpha) * smooth_l1(deltas, targets) + alpha


def kl_variance_of(
    log_vars: Float[Array, "..."], *, clamp: tuple[float, float] = (-7.0, 7.0)
) -> Float[Array, "..."]:
    """Returns the variance of the coded offsets that a head trained with `kl_loss` predicts: `exp(clamped alpha)`."""
    (log_vars,) = box_loss_operands(log_vars=log_vars)
    return jnp.exp(clamp_log_var(log_vars, low=clamp[0], high=clamp[1]))


def box_loss_operands(**arrays: Float[Array, "..."]) -> tuple[Array, ...]:
    """Returns the arrays, in order, in their common float type, which is float32 at least.

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
