import builtins
import os
import pickle
import struct
import sys

import numpy as np
import pytest

from klbox_jax.weights.detectron_file import read_detectron_file
from klbox_jax.weights.torch_file import WeightFileError
from tests.weights.pickles import (
    Build,
    Call,
    Global,
    OldString,
    Raw,
    dump,
    encode,
    old_array,
    write_old_pickle,
)

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
    "columns_first": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "axes_moved": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 0, 2),
    "big_endian": np.arange(4, dtype=">f8"),
    "float16": np.ones((1, 2), np.float16),
    "int64": np.asarray([-1, 2**40]),
    "uint8": np.asarray([0, 255], np.uint8),
    "bool": np.asarray([True, False]),
    "scalar": np.asarray(2.5),
    "empty": np.zeros((0, 3), np.float32),
}


def _read(tmp_path, data):
    path = tmp_path / "weights.pkl"
    path.write_bytes(data)
    return read_detectron_file(path)


def _refused(tmp_path, data, message):
    with pytest.raises(WeightFileError, match=message) as error:
        _read(tmp_path, data)
    assert str(tmp_path / "weights.pkl") in str(error.value)
    assert ";" in str(error.value), "no remedy"


def _same(read, written):
    assert list(read) == list(written)
    for name, array in written.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype.isnative
        assert read[name].dtype.itemsize == array.dtype.itemsize
        assert not read[name].flags.writeable


@pytest.mark.parametrize("config", [None, "XYXY: true\n"])
def test_pickles_of_python_2(tmp_path, config):
    # Of the axes only C and Fortran order: cPickle writes the others in C order.
    arrays = ARRAYS | {"axes_moved": np.ascontiguousarray(ARRAYS["axes_moved"])}
    _same(read_detectron_file(write_old_pickle(tmp_path / "weights.pkl", arrays, config)), arrays)


def test_by_hand_the_bytes_of_python_2(tmp_path):
    # pickle.dumps({'w': numpy.array([1, -2], 'f4')}, 2) of Python 2.7: 1.0 is 3f800000, -2.0 is c0000000.
    data = (
        b"\x80\x02}q\x01U\x01wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80\x3f\x00\x00\x00\xc0tbs."
    )
    read = _read(tmp_path, data)
    assert read["w"].tolist() == [1.0, -2.0]
    assert read["w"].dtype == np.float32


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrapper", ["blobs", "model", None])
def test_pickles_of_python_3(tmp_path, protocol, wrapper):
    rest = {"__author__": "someone", "count": np.float32(3), "none": None, "list": [1, b"\xff", 2.5]}
    root = ARRAYS | rest if wrapper is None else {wrapper: ARRAYS | rest, "matching_heuristics": True}
    _same(_read(tmp_path, pickle.dumps(root, protocol)), ARRAYS)
    older = pickle.dumps(root, protocol).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if protocol < 4:  # names end with a line there, and are counted later
        _same(_read(tmp_path, older), ARRAYS)


HOSTILE = {
    "os.system": Call(Global("os", "system"), ("touch owned",)),
    "posix.system": Call(Global("posix", "system"), ("touch owned",)),
    "__builtin__.eval": Call(Global("__builtin__", "eval"), ("1",)),
    "builtins.getattr": Call(Global("builtins", "getattr"), (1, "x")),
    "numpy.load": Call(Global("numpy", "load"), ("x",)),
    "numpy.core.multiarray.frombuffer": Global("numpy.core.multiarray", "frombuffer"),
    "numpy.testing.runstring": Call(Global("numpy.testing", "runstring"), ("1", {})),
    "torch._utils._rebuild_tensor_v2": Global("torch._utils", "_rebuild_tensor_v2"),
    "copy_reg._reconstructor": Global("copy_reg", "_reconstructor"),
    "detectron.utils.collections.AttrDict": Global("detectron.utils.collections", "AttrDict"),
    "subprocess.Popen": Raw(b"(U\x01xisubprocess\nPopen\n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_names_are_refused_and_nothing_runs(tmp_path, monkeypatch, name):
    def forbidden(*args):
        raise AssertionError("code from the file was run")

    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(builtins, "eval", forbidden)
    monkeypatch.chdir(tmp_path)
    root = {"blobs": {"w": old_array(np.ones(1)), "v": HOSTILE[name]}}
    _refused(tmp_path, dump(root), f"refused to load {name}, which".replace(".", r"\."))
    assert not (tmp_path / "owned").exists()


def test_an_array_of_objects_is_refused(tmp_path):
    objects = np.asarray([{}, None], object)
    _refused(tmp_path, pickle.dumps({"w": objects}, 2), "refused to load an array of dtype 'O8'")
    records = np.zeros(1, [("a", "f4")])
    _refused(tmp_path, pickle.dumps({"w": records}, 2), "refused to load an array of dtype 'V4'")
    field = Build(Call(Global("numpy", "dtype"), ("f4", 0, 1)), (3, "|", None, ("a",), {}, 4, 1, 0))
    _refused(tmp_path, dump({"w": field}), "refused to load an array of records")


def test_a_message_does_not_hold_the_file(tmp_path):
    # A dtype whose name is as long as an array: pickle calls numpy.dtype with the string.
    name = "f\x00" * 5000
    data = b"\x80\x02cnumpy\ndtype\nX" + struct.pack("<I", len(name)) + name.encode() + b"\x85R."
    path = tmp_path / "w.pkl"
    path.write_bytes(data)
    with pytest.raises(WeightFileError, match="refused to load an array of dtype") as refusal:
        read_detectron_file(str(path))
    assert len(str(refusal.value)) < 400 + len(str(path))
    assert str(refusal.value).isprintable()


def test_a_subclass_of_arrays_is_refused(tmp_path):
    matrix = Call(Global("numpy.core.multiarray", "_reconstruct"), (dict, (0,), b"b"))
    named = matrix._replace(args=(Global("numpy", "matrix"), (0,), "b"))
    _refused(tmp_path, dump({"w": named}), r"refused to load numpy\.matrix")
    number = matrix._replace(args=(1, (0,), "b"))
    _refused(tmp_path, dump({"w": number}), "damaged.*another type")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3,), "an array of shape"),
        ((-1,), "no shape"),
        ((2**40, 2**40), "an array of shape"),
        ((True, 2), "no shape"),
        (2, "no shape"),
        (("2",), "no shape"),
        ((1,) * 100 + (2,), "damaged"),
    ],
)
def test_arrays_that_cannot_be(tmp_path, shape, message):
    array = old_array(np.ones(2, np.float32))
    state = (array.state[0], shape, *array.state[2:])
    _refused(tmp_path, dump({"w": array._replace(state=state)}), message)


def test_an_array_without_contents(tmp_path):
    array = old_array(np.ones(2, np.float32))
    _refused(tmp_path, dump({"w": array.target}), "'w' without contents")
    swapped = array._replace(state=(*array.state[:2], 1, *array.state[3:]))
    _refused(tmp_path, dump({"w": swapped}), "no dtype")


@pytest.mark.parametrize(
    "target",
    [
        Global("numpy", "ndarray"),
        Global("numpy", "dtype"),
        Global("numpy.core.multiarray", "_reconstruct"),
        Global("collections", "OrderedDict"),
        Global("_codecs", "encode"),
    ],
)
@pytest.mark.parametrize("state", [{"__call__": 1}, (None, {"__defaults__": 1})])
def test_admitted_names_cannot_be_changed(tmp_path, target, state):
    _refused(tmp_path, dump({"w": Build(target, state)}), "damaged")


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Nr\xff\xff\xff\xff",  # LONG_BINPUT: 64 GiB of memo slots in the C unpickler
        b"\x96" + struct.pack("<Q", 2**45),  # BYTEARRAY8: zero-filled before it is read
        b"\x8e" + struct.pack("<Q", 2**45),  # BINBYTES8
        b"T" + struct.pack("<i", -5),
        b"c__builtin__\nbytes\n" + b"\x8a\x06" + struct.pack("<Q", 2**45)[:6] + b"\x85R",  # bytes(2**45)
        b"}" + b")" + b"2\x86" * 60 + b"K\x01s",  # a key with 2^60 leaves to hash
        b"(" * 5000,
    ],
)
def test_memory_and_time_bombs(tmp_path, opcodes):
    _refused(tmp_path, dump({"w": Raw(opcodes)}), "damaged|no dictionary of tensors")


def test_copies_of_copies(tmp_path):
    text = encode("a" * 2**16)
    calls = (
        b"](c_codecs\nencode\nq\x01(" + text + encode("latin1") + b"tq\x02R" + b"h\x01h\x02R" * 20_000 + b"e"
    )
    _refused(tmp_path, dump({"w": Raw(calls)}), "copied over and over")


def test_an_array_is_no_contents_of_another(tmp_path):
    array = old_array(np.ones(2, np.float32))
    state = (*array.state[:4], array)
    _refused(tmp_path, dump({"w": array._replace(state=state)}), "no contents")


def test_every_truncation_is_noticed(tmp_path):
    data = dump({"blobs": {OldString(b"w"): old_array(np.arange(3, dtype=np.float32))}})
    for length in range(0, len(data), 3):
        _refused(tmp_path, data[:length], r"weights\.pkl: ")


@pytest.mark.parametrize(
    "data", [b"", b"<!DOCTYPE html>", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"cos\nsystem\n"]
)
def test_other_files_are_refused(tmp_path, data):
    _refused(tmp_path, data, "is not a pickle")


@pytest.mark.parametrize("root", [{}, {"epoch": 3}, [1, 2], "text"])
def test_no_arrays(tmp_path, root):
    _refused(tmp_path, dump(root), "no dictionary of tensors")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(WeightFileError, match=r"absent\.pkl: cannot be read"):
        read_detectron_file(tmp_path / "absent.pkl")
    with pytest.raises(WeightFileError, match="cannot be read"):
        read_detectron_file(tmp_path)


def test_nothing_of_the_writers_is_imported(tmp_path):
    read_detectron_file(write_old_pickle(tmp_path / "weights.pkl", {"w": np.ones(1)}))
    assert not {"torch", "caffe2", "detectron"} & set(sys.modules)
