import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from klbox_jax.models.mobilenet import OUT_CHANNELS, OUT_STRIDES, MobileNetV2

STATISTICS = ("mean", "var")


def _shapes(**attributes):
    net = MobileNetV2(**attributes)
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


# torchvision counts 3,504,872: 2,223,872 without the classifier (1280 * 1000 + 1000), which are 1,811,712
# without the last convolution (320 * 1280 + 2 * 1280).
@pytest.mark.parametrize(("with_head", "count"), [(True, 2_223_872), (False, 1_811_712)])
def test_parameter_count(with_head, count):
    params = flatten_dict(_shapes(with_head=with_head))
    assert sum(leaf.size for path, leaf in params.items() if path[-1] not in STATISTICS) == count


@pytest.mark.parametrize("hw", [(64, 96), (65, 97), (33, 31)])
def test_output_shapes(hw):
    net = MobileNetV2()
    images = jnp.zeros((2, *hw, 3))
    features, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for name, feature in features.items():
        stride = OUT_STRIDES[name]
        assert feature.shape == (2, -(-hw[0] // stride), -(-hw[1] // stride), OUT_CHANNELS[name])


def test_images_of_a_batch_do_not_touch_and_norms_take_no_gradient():
    net = MobileNetV2(with_head=True)
    images = jax.random.normal(jax.random.key(0), (2, 33, 40, 3))
    params = jax.jit(net.init)(jax.random.key(1), images)["params"]

    @jax.jit
    def run(params, images):
        def total(params):
            features = net.apply({"params": params}, images)
            return sum(feature.sum() for feature in features.values()), features

        return jax.grad(total, has_aux=True)(params)

    gradients, features = run(params, images)
    _, swapped = run(params, images[::-1])
    assert features["head"].shape == (2, 2, 2, 1280)
    for name, feature in features.items():
        assert np.abs(feature[0] - feature[1]).max() > 1e-3 * np.abs(feature).max() > 0
        np.testing.assert_allclose(feature, swapped[name][::-1], rtol=1e-5, atol=1e-7)
    for path, gradient in flatten_dict(gradients).items():
        assert np.isfinite(gradient).all()
        assert bool(np.any(gradient)) == (path[-1] == "kernel"), path
