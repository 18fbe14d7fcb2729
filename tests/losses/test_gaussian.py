import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.gaussian import beta_nll, direct_moment_matching, gaussian_kl, gaussian_nll
from tests.references import losses as reference


def test_gaussian_nll_by_hand():
    # e = 3, sigma^2 = 4: 9 / 8 + log 2. The square goes on where smooth L1 ends: 1e6 costs 5e11 at sigma = 1.
    loss = gaussian_nll(jnp.array([3.0, 1e6]), jnp.log(jnp.array([4.0, 1.0])), jnp.zeros(2))
    np.testing.assert_allclose(loss, [9 / 8 + math.log(2), 5e11], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_beta_nll_scales_the_gradients_of_the_likelihood(beta):
    rng = np.random.default_rng(0)
    deltas, log_vars, targets = (jnp.asarray(rng.uniform(-5, 5, 200), jnp.float32) for _ in range(3))

    def gradients(loss):
        return jax.grad(lambda d, a: loss(d, a, targets).sum(), argnums=(0, 1))(deltas, log_vars)

    weight = np.exp(beta * np.asarray(log_vars, np.float64))
    found = gradients(lambda *x: beta_nll(*x, beta=beta))
    for a, b in zip(found, gradients(gaussian_nll), strict=True):
        np.testing.assert_allclose(a, weight * b, rtol=1e-4, atol=1e-5)
    if beta == 1:
        np.testing.assert_allclose(found[0], deltas - targets, rtol=1e-5)


def test_beta_nll_by_hand():
    # e = 3, sigma^2 = 4, beta = 1/2: 2 * (9 / 8 + log 2). Outside the range the weight is clamped too.
    loss = beta_nll(jnp.float32(3), jnp.log(jnp.float32(4)), jnp.float32(0))
    assert loss == pytest.approx(2 * (9 / 8 + math.log(2)), rel=1e-6)
    loss = beta_nll(jnp.float32(3), jnp.float32(99), jnp.float32(0), clamp=(-1.0, 0.0))
    assert loss == pytest.approx(4.5)


@pytest.mark.parametrize("label", [(0.0, 1.0), (0.7, 0.05), (-2.0, 3.0)])
@pytest.mark.parametrize("prediction", [(0.0, 1.0), (0.72, 0.2), (0.7, 0.05), (3.0, 2.0), (-1.0, 8.0)])
def test_gaussian_kl_is_the_integral(label, prediction):
    expected = reference.kl_by_integration(reference.gaussian_log_density, label, prediction)
    with jax.enable_x64(True):
        mean, std, target, label_std = (jnp.float64(x) for x in (*prediction, *label))
        found = gaussian_kl(mean, 2 * jnp.log(std), target, label_std)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_gaussian_kl_near_agreement():
    # Equal but for e = 1e-3 s_p: KL = 5e-7, which a sum of terms near 1 would lose in float32.
    sigma = jnp.float32(0.25)
    loss = gaussian_kl(jnp.float32(2.5e-4), 2 * jnp.log(sigma), jnp.float32(0), sigma)
    assert loss == pytest.approx(5e-7, rel=1e-4)
    assert gaussian_kl(jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.float32(1)) == 0


def test_direct_moment_matching_by_hand():
    # e = 0.5, variance 1: 0.125 + 0.75^2 / 2. e = 3, variance 4: 2.5 + (5 - 0.5).
    deltas, log_vars = jnp.array([0.5, 3.0]), jnp.log(jnp.array([1.0, 4.0]))
    loss = direct_moment_matching(deltas, log_vars, jnp.zeros(2))
    np.testing.assert_allclose(loss, [0.125 + 0.75**2 / 2, 7.0], rtol=1e-6)
    # The mean sees smooth L1 alone, alpha the other term: variance * (variance - e^2), and -4 * 1.
    gradients = jax.grad(lambda *x: direct_moment_matching(*x, jnp.zeros(2)).sum(), argnums=(0, 1))
    np.testing.assert_allclose(gradients(deltas, log_vars), [[0.5, 1.0], [0.75, -4.0]], rtol=1e-5)
