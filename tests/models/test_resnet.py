import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from klbox_jax.models.resnet import BottleneckResNet, Res5Head
from tests.references import networks as reference

THIN = {"stage_blocks": (1, 2, 1, 1), "stage_features": (8, 12, 16, 16), "stem_features": 6}
STATISTICS = ("mean", "var")


def shapes_of(network, images=(1, 64, 64, 3)):
    return flatten_dict(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(images))["params"])


def count(shapes):
    return sum(leaf.size for path, leaf in shapes.items() if path[-1] not in STATISTICS)


def random_params(network, images, seed=0):
    """Norms that are neither the identity nor equal to each other."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, leaf in shapes_of(network, images.shape).items():
        if path[-1] == "var":
            params[path] = rng.uniform(0.5, 1.5, leaf.shape)
        elif path[-1] == "kernel":
            params[path] = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:3])), leaf.shape)
        else:
            params[path] = (path[-1] == "scale") + rng.normal(0, 0.2, leaf.shape)
    return unflatten_dict({path: jnp.asarray(value, jnp.float32) for path, value in params.items()})


# torchvision counts 25,557,032 and 44,549,160, of which the classifier has 2048 * 1000 + 1000.
@pytest.mark.parametrize(("blocks", "published"), [((3, 4, 6, 3), 25_557_032), ((3, 4, 23, 3), 44_549_160)])
def test_parameter_count(blocks, published):
    assert count(shapes_of(BottleneckResNet(stage_blocks=blocks))) == published - 2_049_000


def test_a_c4_detector_splits_the_same_network_in_two():
    whole = shapes_of(BottleneckResNet())
    backbone = shapes_of(BottleneckResNet(out_stages=("res4",)))
    head = shapes_of(Res5Head(), (2, 14, 14, 1024))
    assert backbone | head == whole
    assert not backbone.keys() & head.keys()
    assert jax.eval_shape(
        lambda: Res5Head().init_with_output(jax.random.key(0), jnp.zeros((2, 14, 14, 1024)))[0]
    ).shape == (2, 2048)


@pytest.mark.parametrize("hw", [(64, 96), (97, 75), (33, 31)])
def test_output_shapes(hw):
    images = jnp.zeros((2, *hw, 3))
    features, _ = jax.eval_shape(BottleneckResNet().init_with_output, jax.random.key(0), images)
    assert {name: feature.shape for name, feature in features.items()} == {
        f"res{level}": (2, -(-hw[0] // 2**level), -(-hw[1] // 2**level), 64 * 2**level)
        for level in (2, 3, 4, 5)
    }


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_against_the_loops(stride_in_1x1):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 37, 50, 3)), jnp.float32)
    network = BottleneckResNet(**THIN, stride_in_1x1=stride_in_1x1)
    params = random_params(network, images)
    found = jax.jit(network.apply)({"params": params}, images)
    for i, image in enumerate(np.asarray(images)):
        expected = reference.bottleneck_resnet(image, params, THIN["stage_blocks"], stride_in_1x1)
        assert set(found) == set(expected)
        for name, feature in expected.items():
            scale = np.abs(feature).max()
            assert scale > 0.1
            np.testing.assert_allclose(found[name][i], feature, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_the_head_goes_on_where_the_backbone_stopped(stride_in_1x1):
    images = jnp.asarray(np.random.default_rng(2).normal(size=(1, 64, 64, 3)), jnp.float32)
    network = BottleneckResNet(**THIN, stride_in_1x1=stride_in_1x1)
    params = random_params(network, images)
    whole = jax.jit(network.apply)({"params": params}, images)
    head = Res5Head(blocks=1, features=16, stride_in_1x1=stride_in_1x1)
    vector = jax.jit(head.apply)({"params": {"res5_0": params["res5_0"]}}, whole["res4"])
    np.testing.assert_allclose(vector, whole["res5"].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)


def test_norms_take_no_gradient_and_only_asked_stages_come_back():
    images = jnp.asarray(np.random.default_rng(3).normal(size=(1, 33, 40, 3)), jnp.float32)
    network = BottleneckResNet(**THIN, out_stages=("res3",))
    params = random_params(network, images)

    @jax.jit
    def gradient(params):
        def total(params):
            features = network.apply({"params": params}, images)
            return features["res3"].sum(), features

        return jax.grad(total, has_aux=True)(params)

    gradients, features = gradient(params)
    assert list(features) == ["res3"]
    assert not any(name.startswith("res4") for name in gradients)
    for path, leaf in flatten_dict(gradients).items():
        assert np.isfinite(leaf).all()
        assert bool(np.any(leaf)) == (path[-1] == "kernel"), path


def test_low_precision_convolutions_keep_float32_params():
    network = BottleneckResNet(**THIN, out_stages=("res2",), dtype=jnp.bfloat16)
    images = jnp.asarray(np.random.default_rng(4).normal(size=(1, 32, 32, 3)), jnp.float32)
    params = random_params(network, images)
    low = jax.jit(network.apply)({"params": params}, images)["res2"]
    exact = jax.jit(network.clone(dtype=None).apply)({"params": params}, images)["res2"]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())
