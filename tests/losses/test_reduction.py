import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.reduction import masked_mean, masked_sum

VALUES = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf], [3.0, 5.0]])
ROWS = jnp.array([True, False, True])


def test_masked_entries_do_not_count_whatever_they_hold():
    # 1 + 2 + 3 + 5 = 11 over 4 entries.
    assert masked_sum(VALUES, ROWS[:, None]) == 11
    assert masked_mean(VALUES, ROWS[:, None]) == 11 / 4


def test_nothing_counts():
    nothing = jnp.zeros((3, 1), bool)
    assert masked_sum(VALUES, nothing) == 0
    assert masked_mean(VALUES, nothing) == 0


def test_gradient_is_zero_under_the_mask():
    gradient = jax.grad(lambda values: masked_mean(values, ROWS[:, None]))(VALUES)
    np.testing.assert_array_equal(gradient, [[0.25, 0.25], [0, 0], [0.25, 0.25]])


def test_sums_in_float32():
    # 4096 ones: bfloat16 cannot count past 256.
    assert masked_sum(jnp.ones(4096, jnp.bfloat16), jnp.ones(4096, bool)) == 4096


def test_ranks_must_agree():
    with pytest.raises(ValueError, match="rank"):
        masked_sum(VALUES, ROWS)
