import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.box_regression import (
    kl_loss,
    kl_loss_note,
    kl_loss_piecewise,
    kl_variance_of,
    l1,
    smooth_l1,
)
from tests.references import losses as reference


def random_inputs(seed, count=2000):
    rng = np.random.default_rng(seed)
    targets = rng.normal(0, 2, count)
    errors = rng.normal(0, 1, count) * 10.0 ** rng.uniform(-3, 3, count)
    log_vars = rng.uniform(-6.5, 6.5, count)
    return tuple(jnp.asarray(x, jnp.float32) for x in (targets - errors, log_vars, targets))


@pytest.mark.parametrize("beta", [1.0, 1 / 9, 2.5])
def test_smooth_l1_equals_the_formula(beta):
    deltas, _, targets = random_inputs(0)
    expected = [reference.smooth_l1(float(t) - float(d), beta) for d, t in zip(deltas, targets, strict=True)]
    np.testing.assert_allclose(smooth_l1(deltas, targets, beta=beta), expected, rtol=2e-5, atol=1e-6)


def test_smooth_l1_by_hand():
    # beta = 1: 0.5^2 / 2 = 0.125; at the joint 1/2; beyond, 3 - 1/2. beta = 0 is |e|.
    targets = jnp.array([0.5, 1.0, -3.0, 0.0])
    np.testing.assert_allclose(smooth_l1(jnp.zeros(4), targets), [0.125, 0.5, 2.5, 0.0])
    np.testing.assert_allclose(smooth_l1(jnp.zeros(4), targets, beta=0.0), [0.5, 1.0, 3.0, 0.0])
    slopes = jax.vmap(jax.grad(smooth_l1))(jnp.array([0.5, 1.0, -3.0, 0.0]), jnp.zeros(4))
    np.testing.assert_allclose(slopes, [0.5, 1.0, -1.0, 0.0], rtol=1e-6)


def test_l1_by_hand():
    np.testing.assert_array_equal(l1(jnp.array([0.5, -3.0]), jnp.array([0.25, 1.0])), [0.25, 4.0])


def test_kl_loss_and_gradients_equal_the_formulas():
    deltas, log_vars, targets = random_inputs(1)
    loss, scale, d_delta, d_alpha = reference.kl_losses(deltas, log_vars, targets)
    error = np.abs(np.asarray(kl_loss(deltas, log_vars, targets)) - loss)
    # The loss crosses zero; rounding scales with its terms, not with their sum.
    assert (error <= 2e-5 * scale + 1e-6).all()
    gradients = jax.grad(lambda d, a: kl_loss(d, a, targets).sum(), argnums=(0, 1))(deltas, log_vars)
    np.testing.assert_allclose(gradients[0], d_delta, rtol=2e-4, atol=1e-4)
    assert (np.abs(np.asarray(gradients[1]) - d_alpha) <= 2e-5 * (scale + 1)).all()


def test_kl_loss_by_hand():
    # e = 0.5, sigma^2 = 1/4: 4 * 0.125 + log(1/4) / 2 = 0.5 - log 2, negative.
    # e = 2, sigma^2 = 3 = 2 * 2 - 1: 1.5 / 3 + log(3) / 2.
    loss = kl_loss(jnp.array([0.0, 2.0]), jnp.log(jnp.array([0.25, 3.0])), jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(loss, [0.5 - math.log(2), 0.5 + math.log(3) / 2], rtol=1e-6)
    assert loss[0] < 0


def test_piecewise_form_is_the_compact_form():
    deltas, log_vars, targets = random_inputs(5, 1996)
    # The joint belongs to both branches: 0.5 exp(-alpha) + alpha / 2, and the slopes agree.
    deltas, targets = (jnp.concatenate([x, y]) for x, y in ((deltas, jnp.zeros(4)), (targets, jnp.ones(4))))
    log_vars = jnp.concatenate([log_vars, jnp.array([-2.0, 0.0, 1.0, 5.0])])
    _, scale, _, _ = reference.kl_losses(deltas, log_vars, targets)

    def value_and_gradients(loss):
        value = loss(deltas, log_vars, targets)
        return value, *jax.grad(lambda *x: loss(*x).sum(), argnums=(0, 1, 2))(deltas, log_vars, targets)

    compact, piecewise = value_and_gradients(kl_loss), value_and_gradients(kl_loss_piecewise)
    for a, b in zip(compact, piecewise, strict=True):
        assert (np.abs(np.asarray(a) - np.asarray(b)) <= 1e-5 * (scale + 1)).all()


def test_piecewise_form_has_finite_gradients_where_the_other_branch_overflows():
    # 1e30 squared is infinite; the slope of the branch taken is exp(-alpha) = 1.
    gradient = jax.grad(kl_loss_piecewise)(jnp.float32(1e30), jnp.float32(0), jnp.float32(0))
    assert gradient == 1


def test_note_form_by_hand():
    # e = 0.5, sigma^2 = 1/4: 4 * 0.125 + log(1/4). The typo counts the second term twice.
    loss = kl_loss_note(jnp.float32(0), jnp.log(jnp.float32(0.25)), jnp.float32(0.5))
    assert loss == pytest.approx(0.5 - math.log(4), abs=1e-6)


def test_zero_log_variance_is_smooth_l1():
    deltas, _, targets = random_inputs(2)
    np.testing.assert_array_equal(kl_loss(deltas, jnp.zeros(2000), targets), smooth_l1(deltas, targets))


@pytest.mark.parametrize(("error", "best_variance"), [(0.2, 0.04), (1.0, 1.0), (3.0, 5.0), (20.0, 39.0)])
def test_best_variance_for_a_fixed_error(error, best_variance):
    def loss(alpha):
        return kl_loss(jnp.float32(0.0), alpha, jnp.float32(error))

    best = jnp.log(jnp.float32(best_variance))
    assert jax.grad(loss)(best) == pytest.approx(0, abs=1e-6)
    assert loss(best) == pytest.approx(0.5 + 0.5 * math.log(best_variance), abs=1e-6)
    assert loss(best) < loss(best + 0.2)
    assert loss(best) < loss(best - 0.2)


def test_finite_for_any_input():
    alphas = jnp.array([-jnp.inf, -1e30, -100.0, -7.0, 0.0, 7.0, 100.0, 1e30, jnp.inf])
    errors = jnp.array([0.0, 1e-30, 1.0, 1e6, -1e6])
    deltas, log_vars = (grid.ravel() for grid in jnp.meshgrid(errors, alphas))
    value, gradients = jax.value_and_grad(
        lambda d, a: kl_loss(d, a, jnp.zeros_like(d)).sum(), argnums=(0, 1)
    )(deltas, log_vars)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_log_variance_outside_the_range_is_drawn_back():
    # Far above: the error is small, so a smaller variance is better, and alpha has to come down.
    gradient = jax.grad(kl_loss, argnums=1)(jnp.float32(0.1), jnp.float32(50.0), jnp.float32(0.0))
    assert gradient == pytest.approx(0.5 - math.exp(-7) * 0.005, rel=1e-5)
    # The error asks for a variance above the range: alpha is not pushed out further.
    assert jax.grad(kl_loss, argnums=1)(jnp.float32(1e6), jnp.float32(50.0), jnp.float32(0.0)) == 0


def test_low_precision_inputs_are_computed_in_float32():
    loss = kl_loss(*(jnp.full((2, 4), 0.3, jnp.bfloat16) for _ in range(3)))
    assert loss.dtype == jnp.float32
    assert smooth_l1(jnp.ones(4, jnp.bfloat16), jnp.zeros(4)).dtype == jnp.float32
    assert kl_variance_of(jnp.ones(4, jnp.bfloat16)).dtype == jnp.float32


def test_variance_of():
    # exp(0), exp(log 4), and the ends of the range.
    np.testing.assert_allclose(
        kl_variance_of(jnp.array([0.0, math.log(4), 99.0, -99.0])),
        [1, 4, math.exp(7), math.exp(-7)],
        rtol=1e-6,
    )
    np.testing.assert_allclose(kl_variance_of(jnp.array([5.0]), clamp=(-1.0, 2.0)), [math.exp(2)], rtol=1e-6)


def test_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match="one shape"):
        kl_loss(jnp.zeros((3, 4)), jnp.zeros((3, 4)), jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="one shape"):
        kl_loss(jnp.zeros((3, 4)), jnp.zeros((3, 1, 4)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="one shape"):
        smooth_l1(jnp.zeros((3, 4)), jnp.zeros(4))
    with pytest.raises(ValueError, match="beta"):
        smooth_l1(jnp.zeros(4), jnp.zeros(4), beta=-1.0)
