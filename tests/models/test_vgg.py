import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from klbox_jax.models.vgg import VGG16, VGGCNNM1024, VGGBoxHead, dropout
from klbox_jax.ops.local_response_norm import local_response_norm
from tests.references import networks as reference
from tests.thin import num_params

KEY = jax.random.key(0)


def random_params(network, images):
    """Kernels as initialised, and biases that are not zero."""
    params = jax.jit(network.init)(KEY, images)["params"]
    rng = np.random.default_rng(5)
    return {
        name: {
            "kernel": layer["kernel"],
            "bias": jnp.asarray(rng.normal(0, 0.3, layer["bias"].shape), jnp.float32),
        }
        for name, layer in params.items()
    }


@pytest.mark.parametrize(
    ("network", "shape", "count"),
    [
        # torchvision's vgg16 counts 138,357,544: 14,714,688 in its features, 4,097,000 in the last layer.
        (VGG16(), (1, 32, 32, 3), 14_714_688),
        (VGGBoxHead(), (1, 7, 7, 512), 138_357_544 - 14_714_688 - 4_097_000),
        # 7*7*3*96, 5*5*96*256, 9*256*512 and twice 9*512*512, with a bias for each output.
        (VGGCNNM1024(), (1, 32, 32, 3), 14_208 + 614_656 + 1_180_160 + 2 * 2_359_808),
        (VGGBoxHead(features=(4096, 1024)), (1, 6, 6, 512), 6 * 6 * 512 * 4096 + 4096 + 4096 * 1024 + 1024),
    ],
)
def test_parameter_count(network, shape, count):
    assert num_params(jax.eval_shape(network.init, KEY, jnp.zeros(shape))) == count


@pytest.mark.parametrize("network", [VGG16(), VGGCNNM1024()], ids=["vgg16", "m1024"])
@pytest.mark.parametrize("hw", [(600, 1000), (64, 96), (65, 79), (17, 1)])
def test_a_cell_for_each_anchor(network, hw):
    outputs, _ = jax.eval_shape(network.init_with_output, KEY, jnp.zeros((1, *hw, 3)))
    assert {name: x.shape for name, x in outputs.items()} == {
        "res4": (1, -(-hw[0] // 16), -(-hw[1] // 16), 512)
    }


@pytest.mark.parametrize("hw", [(32, 48), (35, 50)])
def test_vgg16_against_the_loops(hw):
    network = VGG16(stage_features=(4, 5, 6, 7, 8), stage_convs=(1, 2, 1, 1, 2))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, *hw, 3)), jnp.float32)
    params = random_params(network, images)
    found = jax.jit(network.apply)({"params": params}, images)["res4"]
    for i, image in enumerate(np.asarray(images)):
        expected = reference.vgg16(image, params, (1, 2, 1, 1, 2))
        np.testing.assert_allclose(found[i], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("hw", [(32, 48), (35, 50)])
def test_m1024_against_the_loops(hw):
    network = VGGCNNM1024(features=(6, 8, 7, 5, 9))
    images = jnp.asarray(np.random.default_rng(1).normal(0, 40, (2, *hw, 3)), jnp.float32)
    params = random_params(network, images)
    found = jax.jit(network.apply)({"params": params}, images)["res4"]
    for i, image in enumerate(np.asarray(images)):
        # ceil(n / 16) cells read 16 * ceil(n / 16) + 19 pixels, of which 9 come before the image.
        after = [16 * -(-side // 16) + 10 - side for side in hw]
        padded = np.pad(image, ((9, after[0]), (9, after[1]), (0, 0)))
        expected = reference.vgg_cnn_m(padded, params)
        np.testing.assert_allclose(found[i], expected, atol=1e-5 * np.abs(expected).max())


def test_m1024_cells_stand_on_their_anchors():
    network = VGGCNNM1024(features=(1, 1, 1, 1, 1))
    # One row of pixels lit in each image; with kernels of ones a cell answers if it sees that row.
    images = jnp.broadcast_to(jnp.eye(208)[:, :, None, None], (208, 208, 16, 3))
    shapes = jax.eval_shape(network.init, KEY, images)["params"]
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, float(leaf.ndim == 4)), shapes)
    answers = np.asarray(jax.jit(network.apply)({"params": params}, images)["res4"][:, :, 0, 0]) > 0
    for cell in (5, 6, 7):
        rows = np.flatnonzero(answers[:, cell])
        # The field of view: 7 + 2*2 + 4*4 + 2*8 + 3 * 2*16 = 139 pixels.
        assert len(rows) == rows[-1] - rows[0] + 1 == 139
        assert (rows[0] + rows[-1] + 1) / 2 == 16 * cell + 8.5


def test_local_response_norm():
    x = np.float32(np.random.default_rng(2).normal(0, 100, (3, 4, 9)))
    normalize = jax.jit(local_response_norm)
    np.testing.assert_allclose(
        local_response_norm(jnp.asarray(x)), reference.local_response_norm(x), rtol=2e-6
    )
    # 100 / (2 + 1e-4 * 100^2) ** 0.75 = 100 / 3 ** 0.75; the sixth channel is out of the third's sight.
    lone = jnp.zeros(7).at[2].set(100.0)
    np.testing.assert_allclose(normalize(lone)[2], 100 / 3**0.75, rtol=1e-6)
    np.testing.assert_allclose(normalize(lone.at[5].set(1e3))[2], 100 / 3**0.75, rtol=1e-6)
    gradient = jax.grad(lambda x: normalize(x).sum())(jnp.zeros(7))
    np.testing.assert_allclose(gradient, 2**-0.75, rtol=1e-6)


def test_box_head_by_hand():
    # Inputs count row by row, channels last: 5 is (1, 0, 1) and 6 is (1, 1, 0). fc7 swaps the two.
    params = unflatten_dict(
        {
            ("fc6", "kernel"): jnp.zeros((8, 2)).at[5, 0].set(1.0).at[6, 1].set(1.0),
            ("fc6", "bias"): jnp.array([1.0, -9.0]),
            ("fc7", "kernel"): jnp.array([[0.0, 2.0], [1.0, 0.0]]),
            ("fc7", "bias"): jnp.array([0.5, -1.0]),
        }
    )
    pooled = jnp.zeros((1, 2, 2, 2)).at[0, 1, 0, 1].set(3.0).at[0, 1, 1, 0].set(4.0)
    # fc6: relu(3 + 1), relu(4 - 9); fc7: 0 + 0.5, 2 * 4 - 1.
    head = VGGBoxHead(features=(2, 2))
    np.testing.assert_allclose(head.apply({"params": params}, pooled), [[0.5, 7.0]])


def test_dropout_in_training_only():
    head = VGGBoxHead(features=(64, 64))
    pooled = jnp.asarray(np.random.default_rng(3).normal(size=(20, 2, 2, 8)), jnp.float32)
    variables = jax.jit(head.init)(KEY, pooled)
    apply = jax.jit(head.apply)
    plain = apply(variables, pooled)
    first, again, other = (apply(variables, pooled, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    keeps_all = VGGBoxHead(features=(64, 64), dropout_rate=0.0)
    np.testing.assert_allclose(jax.jit(keeps_all.apply)(variables, pooled, KEY), plain, rtol=1e-5)
    values = dropout(jnp.full(10_000, 3.0), KEY, rate=0.25)
    assert set(np.unique(values).tolist()) == {0.0, 4.0}
    assert abs(float(values.mean()) - 3.0) < 0.1  # six standard errors of sqrt(3 / 10000)
