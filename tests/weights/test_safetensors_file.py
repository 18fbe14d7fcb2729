import json
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.provenance import check_provenance
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.safetensors_file import check_params, load_params, model_metadata, save_params
from tests.thin import scenes_config, thin_model
from tests.weights.small_detector import SIDE, trained_params

PARAMS = {
    "backbone": {"stem": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7}},
    "rpn": {"head": {"bias": np.array([-1.5, 0.1], np.float32)}},
}


def write_raw(path, header, data=b""):
    """A file with any header, right or wrong: its length in 8 bytes, JSON, the numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    save_params(path, jax.device_put(PARAMS), metadata={"step": "3"})
    params, metadata = load_params(path)
    equal(params, PARAMS)
    assert metadata == {"step": "3"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    # Read by the format's definition: the header's length, the header, the numbers.
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    entry = header["backbone/stem/kernel"]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    assert (entry["dtype"], entry["shape"]) == ("F32", [2, 3])
    np.testing.assert_array_equal(np.frombuffer(raw[begin:end], "<f4"), np.arange(6, dtype=np.float32) / 7)


def test_float16_rounds_to_eleven_bits_and_reads_as_float32(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_params(path, PARAMS, metadata={}, dtype="float16")
    params, _ = load_params(path)
    equal(params, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), PARAMS))
    for value, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=2**-11)
    assert safetensors.numpy.load_file(path)["rpn/head/bias"].dtype == np.float16


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (np.nan, "float32"), (np.inf, "float16")])
def test_numbers_that_a_file_cannot_hold_leave_the_old_file(tmp_path, value, dtype):
    path = tmp_path / "weights.safetensors"
    save_params(path, PARAMS, metadata={})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"^not finite as {dtype}.*: a/b$"):
        save_params(path, {"a": {"b": np.array([1.0, value], np.float32)}}, metadata={}, dtype=dtype)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"^dtype must be float32 or float16, not 'int8'$"):
        save_params(path, PARAMS, metadata={}, dtype="int8")


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NAN = np.array([np.nan], np.float32).tobytes()
BAD = {
    "empty": (b"", "is not a safetensors file"),
    "text": (b"this is not what it is called, and long enough", "is not a safetensors file"),
    "header beyond the file": (struct.pack("<Q", 10**6) + b"{}", "is not a safetensors file"),
    "header of exabytes": (struct.pack("<Q", 2**62) + b"{}", "is not a safetensors file"),
}
BAD_HEADERS = {
    "no JSON": (b'{"a": ', b"", "is not a safetensors file"),
    "truncated": ({"a": entry([4], 0, 16)}, b"\0" * 12, "is not a safetensors file, or is truncated"),
    "bytes to spare": ({"a": entry([4], 0, 16)}, b"\0" * 20, "is not a safetensors file, or is truncated"),
    "another size": ({"a": entry([2**40], 0, 16)}, b"\0" * 16, "is not a safetensors file"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, "is not a safetensors file"),
    "outside": ({"a": entry([2], 8, 16)}, b"\0" * 8, "is not a safetensors file"),
    "type": ({"a": entry([2], 0, 16, "I64")}, b"\0" * 16, "'a' is of type I64, not float16 or float32"),
    "NaN": ({"a": entry([1], 0, 4)}, NAN, "'a' is not finite"),
    "name of nothing": ({"a//b": entry([1], 0, 4)}, b"\0" * 4, "names of its tensors are not paths.*: a//b"),
    "leaf and branch": (
        {"a": entry([1], 0, 4), "a/b": entry([1], 4, 8)},
        b"\0" * 8,
        "names of its tensors are not paths.*: a;",
    ),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_HEADERS, "missing", "folder"])
def test_a_bad_file_is_refused_in_one_line(tmp_path, case):
    path = tmp_path / "weights.safetensors"
    if case in BAD:
        content, message = BAD[case]
        path.write_bytes(content)
    elif case in BAD_HEADERS:
        header, data, message = BAD_HEADERS[case]
        write_raw(path, header, data)
    else:
        message = "cannot be read"
        if case == "folder":
            path.mkdir()
    with pytest.raises(WeightFileError, match=message) as error:
        load_params(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_what_does_not_fit_a_model_is_listed():
    check_params(PARAMS, PARAMS, path="weights.safetensors")
    loaded = {
        "backbone": {"stems": {"kernel": np.zeros((2, 3))}},
        "rpn": {"head": {"bias": np.zeros(3)}},
    }
    with pytest.raises(WeightFileError) as error:
        check_params(loaded, PARAMS, path="weights.safetensors")
    assert str(error.value) == (
        "weights.safetensors: does not fit the model; parameters that the file does not have: "
        "backbone/stem/kernel (none, nearest backbone/stems/kernel); tensors that the model has no place for: "
        "backbone/stems/kernel (unknown, nearest backbone/stem/kernel); tensors of another shape: rpn/head/bias "
        "(shape (3,) here, not (2,)). Build the model that it was trained as."
    )


@pytest.fixture(scope="module")
def detector():
    return thin_model("loss=kl"), trained_params(log_vars=True)


def load(model, params, path, **options):
    return load_weights(
        jax.tree.map(lambda leaf: np.full_like(leaf, -7.0), params),
        path,
        box_coder=model.roi_heads.box_coder,
        rpn_box_coder=model.rpn.box_coder,
        pooled_side=SIDE,
        **options,
    )


def test_a_detector_is_filled_from_its_own_file(tmp_path, detector):
    model, params = detector
    path = tmp_path / "weights.safetensors"
    save_params(path, params, metadata=model_metadata(model))
    loaded, report = load(model, params, path)
    for value, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(value, wanted)
    assert len(report.loaded) == len(flatten_dict(params))
    assert report.reinitialized == {}
    assert report.provenance.source == "klbox_jax"
    assert report.provenance.box_coder == CornerBoxCoder((10.0, 10.0, 10.0, 10.0))
    assert report.provenance.rpn_box_coder == CenterBoxCoder((1.0, 1.0, 1.0, 1.0))
    config = scenes_config("loss=kl").model
    check_provenance(config, report.provenance)
    config.pixel_mean = (0.0, 0.0, 0.0)
    with pytest.raises(WeightFileError, match=r"^The klbox_jax weights need config\.model\.pixel_mean = "):
        check_provenance(config, report.provenance)


def test_fine_tuning_to_other_classes_keeps_the_rest(tmp_path, detector):
    model, params = detector
    path = tmp_path / "weights.safetensors"
    head = params["roi_heads"]["box_predictor"]["cls_score"]
    other = {name: np.zeros((*value.shape[:-1], 9), np.float32) for name, value in head.items()}
    stored = jax.tree.map(lambda leaf: leaf, params)
    stored["roi_heads"]["box_predictor"]["cls_score"] = other
    save_params(path, stored, metadata=model_metadata(model))
    with pytest.raises(WeightFileError, match=r"cls_score/bias \(.* has shape \(9,\) here, not \(4,\)"):
        load(model, params, path)
    loaded, report = load(model, params, path, init_partial=True)
    assert set(report.reinitialized) == {"roi_heads/box_predictor/cls_score"}
    flat, wanted = flatten_dict(loaded), flatten_dict(params)
    for name, value in flat.items():
        np.testing.assert_array_equal(value, -7.0 if "cls_score" in name else wanted[name])


def test_a_file_without_conventions_fills_no_detector(tmp_path, detector):
    model, params = detector
    path = tmp_path / "weights.safetensors"
    for metadata in ({}, {"conventions": "{}"}, {"conventions": '{"pixel_mean": 3}'}):
        save_params(path, params, metadata=metadata)
        with pytest.raises(
            WeightFileError, match=r"weights\.safetensors: its metadata lacks the conventions"
        ):
            load(model, params, path)
