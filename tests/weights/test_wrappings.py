"""Checkpoints as training scripts write them: wrappers' prefixes, names of the state, and what is stored with it."""

import ml_dtypes
import numpy as np
import pytest

from klbox_jax.ops.box_coder import CenterBoxCoder
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.torch_file import read_torch_file
from klbox_jax.weights.weight_file import read_weight_file, weights_digest, without_wrappers
from tests.weights import small_detector
from tests.weights.pickles import ORDERED_DICT, Call, Global, Raw, dump, encode
from tests.weights.small_detector import SIDE, fresh_params, trained_params
from tests.weights.test_convert import _same
from tests.weights.test_safetensors_file import write_raw
from tests.weights.test_torch_file import _contiguous, _zip_bytes, write_zip

CENTER = CenterBoxCoder((10.0, 10.0, 5.0, 5.0))


@pytest.fixture(scope="module")
def trained():
    return trained_params()


@pytest.fixture(scope="module")
def state(trained):
    return small_detector.torchvision_state(trained)


def _load(path):
    return load_weights(fresh_params(), path, pooled_side=SIDE, box_coder=CENTER)[0]


def _prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "net.",
     "model.module.", "lit.", "student.detector.", "_fsdp_wrapped_module.", "ema_model.module."],
)  # fmt: skip
def test_prefixes_of_wrappers(tmp_path, trained, state, prefix):
    _same(_load(write_zip(tmp_path / "a.pth", _prefixed(state, prefix))), trained)


@pytest.mark.parametrize("counter", ["n_averaged", "module.n_averaged", "num_updates", "step"])
def test_averaged_models(tmp_path, trained, state, counter):
    wrapped = {counter: np.asarray(3)} | _prefixed(state, "module." * (1 + counter.startswith("module.")))
    _same(_load(write_zip(tmp_path / "a.pth", wrapped)), trained)


def test_a_compiled_part_of_a_network(tmp_path, trained, state):
    compiled = {name.replace("backbone.", "backbone._orig_mod."): value for name, value in state.items()}
    _same(_load(write_zip(tmp_path / "a.pth", compiled)), trained)
    # Two names that would become one stay two.
    both = {"a._orig_mod.b": np.zeros(1), "a.b": np.zeros(1)}
    assert without_wrappers(both).keys() == both.keys()


def test_a_prefix_of_some_names_is_part_of_them(state):
    mixed = {"module.a": np.zeros(1), "b": np.zeros(1)}
    assert without_wrappers(mixed).keys() == mixed.keys()


NOTHING = {
    "counter": Call(Global("collections", "Counter"), ({16: 1, 22: 1},)),
    "dtype": Global("torch", "float32"),
    "device": Call(Global("torch", "device"), ("cuda", 0)),
    "size": Call(Global("torch", "Size"), ((1, 2),)),
    "layout": Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
    "set": Call(Global("__builtin__", "set"), ([1, 2],)),
    "complex": Call(Global("builtins", "complex"), (1, 2)),
    "parameter": Global("torch.nn.parameter", "Parameter"),
}


def _raw_state(array):
    return Raw(
        encode(ORDERED_DICT) + b"(" + encode("a") + encode(_contiguous(array, "0", legacy=False)) + b"u"
    )


def _read(tmp_path, root, array):
    path = tmp_path / "a.pth"
    path.write_bytes(_zip_bytes(root, {"0": array}))
    return list(read_torch_file(path))


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights", "params", "ema",
     "model_ema", "ema_state_dict", "state_dict_ema", "module"],
)  # fmt: skip
def test_names_of_the_state(tmp_path, key):
    array = np.ones(2, np.float32)
    root = {"epoch": 3, "optimizer": {"state": _raw_state(array)}, key: _raw_state(array)}
    assert _read(tmp_path, root, array) == ["a"]


def test_nested_and_unknown_names_of_the_state(tmp_path):
    array = np.ones(2, np.float32)
    tensors = _raw_state(array)
    assert _read(tmp_path, {"state_dict": {"model": tensors}, "lr": 3}, array) == ["a"]
    # A dictionary of settings under a known name is passed over, and states of the training are left out.
    root = {
        "model": {"name": "resnet"},
        "detector": tensors,
        "optimizer_state": tensors,
        "lr_scheduler": tensors,
    }
    assert _read(tmp_path, root, array) == ["detector.a"]
    # The trained network is preferred to its average.
    assert _read(tmp_path, {"ema": {"b": tensors}, "model": tensors}, array) == ["a"]


@pytest.mark.parametrize("name", NOTHING)
def test_what_torch_reads_beside_the_tensors_is_ignored(tmp_path, name):
    array = np.ones(2, np.float32)
    root = {
        "lr_scheduler": {"milestones": NOTHING[name]},
        "x": NOTHING[name],
        "model_state_dict": _raw_state(array),
    }
    assert _read(tmp_path, root, array) == ["a"]


def test_further_ways_to_build_a_tensor(tmp_path):
    array = np.ones(2, np.float32)
    tensor = _contiguous(array, "0", legacy=False)
    by_type = Global("torch._tensor", "_rebuild_from_type_v2")
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    parameter = Call(
        Global("torch._utils", "_rebuild_parameter_with_state"), (tensor, True, ORDERED_DICT, {"note": 1})
    )
    root = {
        "a": parameter,
        "b": Call(by_type, (rebuild, Global("torch", "Tensor"), tensor.args, {"x": 1})),
        "c": Call(Global("torch._utils", "_rebuild_tensor"), tensor.args[:4]),
    }
    assert _read(tmp_path, root, array) == ["a", "b", "c"]
    for function in (Global("torch", "device"), Global("collections", "OrderedDict")):
        evil = {"a": Call(by_type, (function, Global("torch", "Tensor"), tensor.args, {}))}
        with pytest.raises(WeightFileError, match="damaged"):
            _read(tmp_path, evil, array)


@pytest.mark.parametrize(
    "name", [("argparse", "Namespace"), ("builtins", "print"), ("torch", "load"), ("torch", "hub")]
)
def test_other_names_stay_refused(tmp_path, name):
    root = {"model": {"a": 1}, "args": Call(Global(*name), ())}
    with pytest.raises(WeightFileError, match=rf"refused to load {name[0]}\.{name[1]}"):
        _read(tmp_path, root, np.ones(1, np.float32))


def _safetensors(path, tensors):
    """The format by hand: a JSON header and the numbers."""
    names = {
        "float32": "F32",
        "bfloat16": "BF16",
        "int64": "I64",
        "float16": "F16",
        "bool": "BOOL",
        "float64": "F64",
    }
    header, data = {}, b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        entry = {"dtype": names[value.dtype.name], "shape": list(value.shape)}
        header[name] = entry | {"data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return write_raw(path, header, data)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_a_state_dict_of_torch_as_safetensors(tmp_path, trained, state, dtype):
    tensors = {name: value.astype(dtype) for name, value in _prefixed(state, "module.").items()}
    tensors["module.backbone.body.bn1.num_batches_tracked"] = np.asarray(7)
    loaded = _load(_safetensors(tmp_path / "a.safetensors", tensors))
    from_torch = _load(write_zip(tmp_path / "a.pth", tensors))
    _same(loaded, from_torch)
    if dtype == np.float32:
        _same(loaded, trained)


def test_types_that_no_network_of_ours_reads(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
    with pytest.raises(WeightFileError, match=r"a\.safetensors: 'a' is of type F8_E4M3, which is not read"):
        read_weight_file(str(write_raw(tmp_path / "a.safetensors", header, b"\0")))


def test_an_exported_folder_and_one_without_weights(tmp_path, trained, state):
    folder = tmp_path / "export"
    folder.mkdir()
    with pytest.raises(
        WeightFileError, match=r"export: is a folder without model\.safetensors, and not the folder"
    ):
        _load(folder)
    path = _safetensors(folder / "model.safetensors", state)
    _same(_load(folder), trained)
    assert weights_digest(folder) == weights_digest(path)


def test_a_pickle_that_is_no_zip_and_no_state(tmp_path):
    (tmp_path / "a.pth").write_bytes(dump({"model": {"a": 1}}))
    with pytest.raises(WeightFileError, match="holds no dictionary of tensors"):
        _load(tmp_path / "a.pth")
