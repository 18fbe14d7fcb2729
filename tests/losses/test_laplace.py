import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.laplace import laplace_nll, lasernet_kl
from tests.references import losses as reference


def test_laplace_nll_by_hand():
    # |e| = 3, b = 2, so alpha = log 4: 3 / 2 + log 4.
    loss = laplace_nll(jnp.float32(-1), jnp.log(jnp.float32(4)), jnp.float32(2))
    assert loss == pytest.approx(1.5 + math.log(4), rel=1e-6)


@pytest.mark.parametrize("label", [(0.0, 1.0), (0.7, 0.05), (-2.0, 3.0)])
@pytest.mark.parametrize("prediction", [(0.0, 1.0), (0.72, 0.2), (0.7, 0.05), (3.0, 2.0), (-1.0, 8.0)])
def test_lasernet_kl_is_the_integral(label, prediction):
    expected = reference.kl_by_integration(reference.laplace_log_density, label, prediction)
    with jax.enable_x64(True):
        mean, std, target, label_std = (jnp.float64(x) for x in (*prediction, *label))
        found = lasernet_kl(mean, 2 * jnp.log(std / math.sqrt(2)), target, label_std)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_lasernet_kl_is_symmetric_in_the_sign_of_the_error():
    # Without the absolute value inside exp() the two would differ by orders of magnitude.
    deltas = jnp.array([-2.0, 2.0])
    loss = lasernet_kl(deltas, jnp.zeros(2), jnp.zeros(2), jnp.full(2, 0.3))
    assert loss[0] == loss[1]
    # b_p = 1, b_l = 0.3 / sqrt(2): -log b_l + b_l exp(-2 / b_l) + 2 - 1.
    b_l = 0.3 / math.sqrt(2)
    assert loss[0] == pytest.approx(1 - math.log(b_l) + b_l * math.exp(-2 / b_l), rel=1e-6)


@pytest.mark.parametrize("std", [1e-3, 1e-10])
def test_lasernet_kl_of_a_nearly_certain_label_is_the_likelihood(std):
    # As b_l goes to 0, KL = NLL - (1 + log 2 b_l).
    deltas, log_vars = jnp.array([0.3, -2.0, 50.0]), jnp.array([0.0, -3.0, 2.0])
    loss = lasernet_kl(deltas, log_vars, jnp.zeros(3), jnp.full(3, std))
    expected = np.asarray(laplace_nll(deltas, log_vars, jnp.zeros(3))) - 1 - math.log(math.sqrt(2) * std)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_lasernet_kl_near_agreement():
    # b_p = b_l = b, |e| = 1e-2 b: exp(-x) - 1 + x = x^2 / 2 - x^3 / 6 + ..., slope 1 - exp(-x) over b.
    b, x = 0.5, 1e-2
    arguments = (
        jnp.float32(b * x),
        jnp.float32(2 * math.log(b)),
        jnp.float32(0),
        jnp.float32(b * math.sqrt(2)),
    )
    value, slope = jax.value_and_grad(lasernet_kl)(*arguments)
    assert value == pytest.approx(x**2 / 2 - x**3 / 6, rel=1e-4)
    assert slope == pytest.approx(-math.expm1(-x) / b, rel=1e-4)
    # At the label itself the likelihood has a kink, the divergence none.
    zero = (jnp.float32(0), *arguments[1:])
    assert lasernet_kl(*zero) == pytest.approx(0, abs=1e-12)
    assert jax.grad(lasernet_kl)(*zero) == 0
