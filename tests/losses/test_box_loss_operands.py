import jax
import jax.numpy as jnp
import pytest

from klbox_jax.losses.box_regression import box_loss_operands


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((jnp.bfloat16, jnp.float16), jnp.float32),
        ((jnp.bfloat16, jnp.float32), jnp.float32),
        ((jnp.float32, jnp.float64), jnp.float64),
    ],
)
def test_common_type_is_float32_at_least(dtypes, expected):
    with jax.enable_x64(True):
        arrays = box_loss_operands(a=jnp.ones(3, dtypes[0]), b=jnp.zeros(3, dtypes[1]))
        assert [array.dtype for array in arrays] == [expected, expected]
        assert [array[0] for array in arrays] == [1, 0]


def test_the_error_names_the_shapes():
    with pytest.raises(ValueError, match=r"one shape, got deltas \(2, 4\), targets \(4,\)"):
        box_loss_operands(deltas=jnp.zeros((2, 4)), targets=jnp.zeros(4))
