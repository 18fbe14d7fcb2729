import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from klbox_jax.models.mobilenet import MobileNetV2
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.torch_file import WeightFileError, read_torch_file
from klbox_jax.weights.torchvision_names import mobilenet_v2_names
from tests.weights.test_torch_file import write_zip

REAL_FILE = pathlib.Path(__file__).parents[3] / "shared/weights/mobilenet_v2-b0353104.pth"


@pytest.fixture(scope="module")
def params():
    net = MobileNetV2()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    return {"backbone": shapes, "rpn": {"bias": np.zeros(3, np.float32)}}


@pytest.fixture(scope="module")
def state():
    """A state dict of torchvision's names and shapes, every tensor filled with its own number."""
    net = MobileNetV2(with_head=True)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    state = {}
    for number, (path, leaf) in enumerate(sorted(flatten_dict(shapes).items())):
        shape = leaf.shape if path[-1] != "kernel" else tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))
        state[mobilenet_v2_names()[path]] = np.full(shape, number, np.float32)
    state["features.0.0.weight"] = np.arange(32 * 3 * 3 * 3, dtype=np.float32).reshape(32, 3, 3, 3)
    state["features.0.1.num_batches_tracked"] = np.asarray(7, np.int64)
    state["classifier.1.weight"] = np.zeros((10, 1280), np.float32)
    return state


def _load(params, path):
    return load_weights(params, path)[0]


def test_names_are_torchvisions():
    names = mobilenet_v2_names()
    assert names["stem", "conv", "kernel"] == "features.0.0.weight"
    assert names["block_1", "depthwise", "conv", "kernel"] == "features.1.conv.0.0.weight"
    assert names["block_1", "project", "norm", "mean"] == "features.1.conv.2.running_mean"
    assert names["block_2", "expand", "norm", "scale"] == "features.2.conv.0.1.weight"
    assert names["block_17", "depthwise", "norm", "var"] == "features.17.conv.1.1.running_var"
    assert names["block_17", "project", "conv", "kernel"] == "features.17.conv.2.weight"
    assert names["head", "norm", "bias"] == "features.18.1.bias"
    # 52 convolutions, each with one kernel and four params of its norm.
    assert len(names) == len(set(names.values())) == 260


def test_every_tensor_lands_in_its_place(tmp_path, params, state):
    loaded = _load(params, write_zip(tmp_path / "weights.pth", state))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert loaded["rpn"]["bias"] is params["rpn"]["bias"]
    loaded = loaded["backbone"]
    kernel = loaded["stem"]["conv"]["kernel"]
    for out, channel, row, column in ((0, 0, 0, 0), (31, 2, 1, 0), (5, 1, 2, 1)):
        assert kernel[row, column, channel, out] == state["features.0.0.weight"][out, channel, row, column]
    for key, value in flatten_dict(loaded).items():
        assert value.dtype == jnp.float32
        if key[:2] != ("stem", "conv"):
            np.testing.assert_allclose(value, state[mobilenet_v2_names()[key]].flat[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.3.conv.1.1.running_var": None}, r"block_3/depthwise/norm/var \(the file has none"),
        ({"features.19.0.weight": np.zeros(1, np.float32)}, r"no place for: features\.19\.0\.weight"),
        (
            {"features.2.conv.3.bias": np.zeros(25, np.float32)},
            r"features\.2\.conv\.3\.bias has shape \(25,\)",
        ),
        (
            {"features.0.0.weight": np.zeros((3, 32, 3, 3), np.float32)},
            r"features\.0\.0\.weight has shape \(3, 3, 32, 3\)",
        ),
        ({"features.0.0.weight": np.zeros((32, 3), np.float32)}, r"features\.0\.0\.weight has shape"),
        (
            {"features.5.conv.3.weight": np.full(32, np.nan, np.float32)},
            r"'features\.5\.conv\.3\.weight' is not finite",
        ),
    ],
)
def test_strict(tmp_path, params, state, change, message):
    changed = {name: value for name, value in (state | change).items() if value is not None}
    path = write_zip(tmp_path / "weights.pth", changed)
    with pytest.raises(WeightFileError, match=message) as error:
        _load(params, path)
    assert str(path) in str(error.value)


@pytest.mark.skipif(not REAL_FILE.exists(), reason="torchvision's mobilenet_v2-b0353104.pth is not at hand")
def test_published_weights(params):
    state = read_torch_file(REAL_FILE)
    # 52 * 5 + the classifier's two + 52 counters of batches
    assert len(state) == 314
    assert state["classifier.1.weight"].shape == (1000, 1280)
    loaded = _load(params, REAL_FILE)["backbone"]
    assert jax.tree.structure(loaded) == jax.tree.structure(params["backbone"])
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 65, 64, 3)), jnp.float32)
    features = jax.jit(MobileNetV2().apply)({"params": loaded}, images)
    # Trained filters keep the signal's scale through all blocks, which wrongly placed ones do not.
    for feature in features.values():
        assert 0.1 < np.std(feature) < 10
