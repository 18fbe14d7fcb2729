import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.log_variance import clamp_log_var


def test_values():
    alphas = jnp.array([-jnp.inf, -1e30, -7.5, -7.0, 0.3, 7.0, 7.5, 1e30, jnp.inf])
    np.testing.assert_array_equal(clamp_log_var(alphas), np.float32([-7, -7, -7, -7, 0.3, 7, 7, 7, 7]))
    np.testing.assert_array_equal(clamp_log_var(jnp.array([-3.0, 3.0]), low=-1.0, high=2.0), [-1, 2])


@pytest.mark.parametrize(
    ("alpha", "cotangent", "expected"),
    [
        (0.0, 2.0, 2.0),
        (0.0, -2.0, -2.0),
        (7.0, -2.0, -2.0),  # the ends belong to the range
        (-7.0, 2.0, 2.0),
        (9.0, 2.0, 2.0),  # descent lowers alpha: back in
        (9.0, -2.0, 0.0),  # descent would raise it further
        (-9.0, -2.0, -2.0),
        (-9.0, 2.0, 0.0),
        (np.inf, -1.0, 0.0),
        (-np.inf, -1.0, -1.0),
    ],
)
def test_gradient(alpha, cotangent, expected):
    gradient = jax.grad(lambda a: cotangent * clamp_log_var(a))(jnp.float32(alpha))
    assert gradient == expected


def test_descent_comes_back_from_outside():
    # The target alpha of 1 lies inside, the start far outside: a plain clip would never move.
    alpha = jnp.float32(12.0)
    for _ in range(200):
        alpha = alpha - 0.1 * jax.grad(lambda a: (clamp_log_var(a) - 1.0) ** 2)(alpha)
    assert alpha == pytest.approx(1.0, abs=1e-3)


def test_empty_range_is_refused():
    with pytest.raises(ValueError, match="low < high"):
        clamp_log_var(jnp.zeros(2), low=1.0, high=1.0)
