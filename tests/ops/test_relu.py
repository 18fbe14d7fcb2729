import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models import resnet
from klbox_jax.models.resnet import BottleneckResNet
from klbox_jax.ops.relu import relu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_by_hand(dtype):
    x = jnp.array([-jnp.inf, -2.0, -0.0, 0.0, 0.5, jnp.inf, jnp.nan], dtype)
    found, vjp = jax.vjp(jax.jit(relu), x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), [0, 0, 0, 0, 0.5, jnp.inf, jnp.nan])
    (gradient,) = vjp(jnp.full(7, 3.0, dtype))
    assert gradient.dtype == dtype
    # A NaN passes on what arrives, so that it cannot be lost on the way back.
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [0, 0, 0, 0, 3, 3, 3])


def test_what_is_not_a_number_is_not_lost():
    gradient = jax.grad(lambda x: (relu(x) ** 2).sum())(jnp.array([jnp.nan, 1.0]))
    assert np.isnan(gradient[0])
    assert gradient[1] == 2


def test_equal_to_jaxs_own():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6)), jnp.float32)
    found, expected = (jax.vjp(function, x) for function in (relu, jax.nn.relu))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1](x), expected[1](x))


def test_the_gradient_of_residual_blocks_takes_less_memory_than_with_jaxs_own(monkeypatch):
    network = BottleneckResNet(
        stage_blocks=(1, 4), stage_features=(32, 128), stem_features=16, out_stages=("res3",)
    )
    images = jnp.ones((1, 128, 128, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), images)
    result = jax.ShapeDtypeStruct((1, 16, 16, 128), jnp.float32)

    def temporary_bytes():
        def loss(params):
            (result,) = network.apply(params, images).values()
            return jnp.square(result).sum()

        # As users compile: the tests' own level leaves out what matters here.
        options = {"xla_backend_optimization_level": 3}
        compiled = jax.jit(jax.grad(loss), compiler_options=options).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary_bytes()
    monkeypatch.setattr(resnet, "relu", jax.nn.relu)
    # Each of the blocks but the last would keep the sum before its last rectifier.
    assert ours <= temporary_bytes() - 3 * 4 * result.size
