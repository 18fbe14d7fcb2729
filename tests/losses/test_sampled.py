import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.sampled import energy_score
from tests.references import losses as reference


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("num_samples", [1, 7])
def test_equals_the_sums(beta, num_samples):
    rng = np.random.default_rng(0)
    deltas, targets, log_vars = (jnp.asarray(rng.uniform(-6, 6, (50, 4)), jnp.float32) for _ in range(3))
    key = jax.random.key(1)
    found = np.asarray(energy_score(deltas, log_vars, targets, key, num_samples=num_samples, beta=beta))
    noise = np.asarray(jax.random.normal(key, (num_samples + 1, 50, 4)))
    deltas, log_vars, targets = (np.asarray(x, np.float64) for x in (deltas, log_vars, targets))
    for index in np.ndindex(50, 4):
        score, scale = reference.energy_score(
            deltas[index], log_vars[index], targets[index], noise[:, *index], beta
        )
        assert abs(found[index] - score) <= 1e-5 * scale


def test_converges_to_twice_the_crps():
    errors, log_vars = (grid.ravel() for grid in np.meshgrid([0.0, 0.5, -2.0, 10.0], [-2.0, 0.0, 1.5]))
    sigma = np.exp(log_vars / 2)
    deltas, targets = jnp.full(12, 0.7), jnp.asarray(0.7 + errors, jnp.float32)

    def score(deltas, log_vars):
        return energy_score(deltas, log_vars, targets, jax.random.key(0), num_samples=20_000)

    found, pull_back = jax.vjp(jax.jit(score), deltas, jnp.asarray(log_vars, jnp.float32))
    gradients = pull_back(jnp.ones(12))
    expected = 2 * np.array(
        [reference.gaussian_crps(e, alpha) for e, alpha in zip(errors, log_vars, strict=True)]
    )
    # One draw has a standard deviation of at most about 2 sigma (2 for the slopes): 0.014 after 20000.
    assert (np.abs(found - expected[:, 0]) < 0.05 * sigma).all()
    np.testing.assert_allclose(gradients[0], expected[:, 1], atol=0.05)
    assert (np.abs(gradients[1] - expected[:, 2]) < 0.05 * sigma).all()


def test_best_variance_for_a_fixed_error():
    # The CRPS is flat in sigma where 2 phi(e / sigma) = 1 / sqrt(pi), that is at sigma^2 = e^2 / log 2.
    best = math.log(1 / math.log(2))
    assert reference.gaussian_crps(1.0, best)[2] == pytest.approx(0, abs=1e-12)

    def score(alphas):
        zeros, key = jnp.zeros(3), jax.random.key(2)
        return energy_score(zeros, alphas, zeros + 1, key, num_samples=20_000).sum()

    slopes = jax.jit(jax.grad(score))(best + jnp.array([-0.5, 0.0, 0.5]))
    assert slopes[0] < -0.05
    assert slopes[1] == pytest.approx(0, abs=0.03)
    assert slopes[2] > 0.05


def test_a_large_mean_does_not_round_the_spread_away():
    # At 1e6 one float32 step is 0.06; sigma is 0.03.
    near, far = (
        energy_score(x, jnp.float32(-7), x, jax.random.key(0), num_samples=100)
        for x in (jnp.float32(0), jnp.float32(1e6))
    )
    assert near == far


def test_each_entry_has_its_own_noise_and_each_key_its_own():
    zeros = jnp.zeros((2, 4))
    scores = [energy_score(zeros, zeros, zeros, jax.random.key(seed), num_samples=3) for seed in (0, 0, 1)]
    assert len(np.unique(scores[0])) == 8
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).all()


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="num_samples >= 1"):
        energy_score(*(jnp.zeros(4),) * 3, jax.random.key(0), num_samples=0)
