import builtins
import io
import os
import pickle
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from klbox_jax.weights.torch_file import MAGIC_NUMBER, WeightFileError, read_torch_file
from tests.weights.pickles import ORDERED_DICT, Build, Call, Global, Persistent, Raw, dump, encode

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def _storage(key, numel, dtype="float32", view=None, legacy=True):
    pid = ("storage", Global("torch", STORAGES[dtype]), key, "cpu", numel)
    return Persistent((*pid, view) if legacy else pid)


def _tensor(storage, size, stride, offset=0):
    return Call(REBUILD, (storage, offset, size, stride, False, ORDERED_DICT))


def _contiguous(array, key, legacy):
    stride = tuple(step // array.itemsize for step in array.strides)
    return _tensor(_storage(key, array.size, array.dtype.name, legacy=legacy), array.shape, stride)


def _legacy_bytes(root, storages, *, little_endian=True, version=1001):
    system = {"protocol_version": version, "little_endian": little_endian, "type_sizes": {"int": 4}}
    pickles = (MAGIC_NUMBER, version, system, root, list(storages))
    parts = [dump(value) for value in pickles]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return b"".join(parts)


def _zip_bytes(root, storages, *, byte_order=b"little", extra=(), compression=zipfile.ZIP_STORED):
    members = [
        ("archive/data.pkl", dump(root)),
        ("archive/byteorder", byte_order),
        ("archive/version", b"3\n"),
    ]
    members += [(f"archive/data/{key}", array.tobytes()) for key, array in storages.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in (*members, *extra):
            archive.writestr(name, data)
    return buffer.getvalue()


def write_zip(path, state):
    """Writes a state dict of arrays the way today's torch.save does."""
    state = {name: np.asarray(array, order="C") for name, array in state.items()}
    storages = {str(key): array for key, array in enumerate(state.values())}
    root = {
        name: _contiguous(state[name], key, legacy=False) for name, key in zip(state, storages, strict=True)
    }
    path.write_bytes(_zip_bytes(root, storages))
    return path


def _read(tmp_path, data):
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    return read_torch_file(path)


def _refused(tmp_path, data, message):
    with pytest.raises(WeightFileError, match=message) as error:
        _read(tmp_path, data)
    assert str(tmp_path / "weights.pth") in str(error.value)
    assert ";" in str(error.value), "no remedy"


WRITERS = {"legacy": _legacy_bytes, "zip": _zip_bytes}
layouts = pytest.mark.parametrize("layout", WRITERS)


@layouts
@pytest.mark.parametrize("dtype", STORAGES)
def test_every_dtype(tmp_path, layout, dtype):
    values = np.asarray([[0, 1, 1], [1, 0, 1]])
    array = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    root = {"w": _contiguous(array, "7", layout == "legacy")}
    read = _read(tmp_path, WRITERS[layout](root, {"7": array}))
    assert list(read) == ["w"]
    assert read["w"].dtype == array.dtype
    np.testing.assert_array_equal(read["w"].astype(int), values)
    assert not read["w"].flags.writeable


@layouts
def test_strides_offsets_and_shared_storage(tmp_path, layout):
    array = np.arange(12, dtype=np.float32)
    storage = _storage("0", 12, legacy=layout == "legacy")
    root = {
        "rows": _tensor(storage, (3, 4), (4, 1)),
        "transposed": _tensor(storage, (4, 3), (1, 4)),
        "every_third": _tensor(storage, (3,), (3,), offset=2),
        "scalar": _tensor(storage, (), (), offset=11),
        "empty": _tensor(storage, (0, 3), (3, 1)),
        "odd_stride_of_one_row": _tensor(storage, (1, 2), (2**62, 1)),
    }
    read = _read(tmp_path, WRITERS[layout](root, {"0": array}))
    rows = array.reshape(3, 4)
    np.testing.assert_array_equal(read["rows"], rows)
    np.testing.assert_array_equal(read["transposed"], rows.T)
    np.testing.assert_array_equal(read["every_third"], [2, 5, 8])
    assert read["scalar"] == 11
    assert read["scalar"].shape == ()
    assert read["empty"].shape == (0, 3)
    np.testing.assert_array_equal(read["odd_stride_of_one_row"], [[0, 1]])


def test_views_of_a_legacy_storage(tmp_path):
    array = np.arange(10, dtype=np.float32)
    root = {"w": _tensor(_storage("0", 10, view=("0_4", 4, 3)), (2,), (1,), offset=1)}
    np.testing.assert_array_equal(_read(tmp_path, _legacy_bytes(root, {"0": array}))["w"], [5, 6])
    beyond = {"w": _tensor(_storage("0", 10, view=("0_4", 4, 7)), (2,), (1,))}
    _refused(tmp_path, _legacy_bytes(beyond, {"0": array}), "view beyond the end of storage '0'")
    outside = {"w": _tensor(_storage("0", 10, view=("0_4", 4, 3)), (3,), (1,), offset=1)}
    _refused(tmp_path, _legacy_bytes(outside, {"0": array}), "'w' of shape .3,. reaches beyond")


@layouts
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_nested_dictionaries(tmp_path, layout, wrapper):
    array = np.ones(2, np.float32)
    tensor = _contiguous(array, "0", layout == "legacy")
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), (tensor, True, ORDERED_DICT))
    state = {
        "a": parameter,
        "block": {"b": tensor, "count": 3},
        "name": "x",
        "shape": Call(Global("torch", "Size"), ((1,),)),
    }
    root = {"epoch": 3, wrapper: state, "optimizer": {"momentum": tensor, 0: None}}
    assert list(_read(tmp_path, WRITERS[layout](root, {"0": array}))) == ["a", "block.b"]
    # A state dict is an OrderedDict with attributes of its own.
    ordered = Raw(
        encode(ORDERED_DICT) + b"(" + encode("a") + encode(tensor) + b"u" + encode({"_metadata": {}}) + b"b"
    )
    assert list(_read(tmp_path, WRITERS[layout](ordered, {"0": array}))) == ["a"]


HOSTILE = {
    "os.system": Call(Global("os", "system"), ("touch owned",)),
    "posix.system": Call(Global("posix", "system"), ("touch owned",)),
    "builtins.eval": Call(Global("builtins", "eval"), ("1",)),
    "builtins.getattr": Call(Global("builtins", "getattr"), (ORDERED_DICT, "x")),
    "torch.load": Call(Global("torch", "load"), ("x",)),
    "torch.nn.modules.linear.Linear": Global("torch.nn.modules.linear", "Linear"),
    "numpy.core.multiarray.scalar": Call(Global("numpy.core.multiarray", "scalar"), ()),
    "collections.OrderedDict.__init__": Global("collections", "OrderedDict.__init__"),
    "_codecs.encode": Call(Global("_codecs", "encode"), ("x", "latin1")),
    "subprocess.Popen": Raw(b"(" + encode("x") + b"isubprocess\nPopen\n"),
    "shutil.rmtree": Raw(encode("shutil") + encode("rmtree") + b"\x93"),
}


@layouts
@pytest.mark.parametrize("name", HOSTILE)
def test_other_names_are_refused_and_nothing_runs(tmp_path, monkeypatch, layout, name):
    def forbidden(*args):
        raise AssertionError("code from the file was run")

    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(builtins, "eval", forbidden)
    monkeypatch.chdir(tmp_path)
    message = f"refused to load {name}, which"
    _refused(tmp_path, WRITERS[layout]({"w": HOSTILE[name]}, {}), message.replace(".", r"\."))
    assert not (tmp_path / "owned").exists()


def test_hostile_code_in_the_legacy_header(tmp_path):
    data = dump(MAGIC_NUMBER) + dump(HOSTILE["os.system"])
    _refused(tmp_path, data, r"refused to load os\.system")


@pytest.mark.parametrize(
    "target", [REBUILD, Global("torch", "FloatStorage"), Global("collections", "OrderedDict")]
)
@pytest.mark.parametrize("state", [{"__call__": 1}, (None, {"__defaults__": 1, "_dtype": 2})])
def test_admitted_names_cannot_be_changed(tmp_path, target, state):
    _refused(tmp_path, _legacy_bytes({"w": Build(target, state)}, {}), "damaged")


def test_attributes_of_a_dictionary_do_not_hide_its_methods(tmp_path):
    array = np.ones(1, np.float32)
    tensor = _contiguous(array, "0", legacy=True)
    filled = encode(ORDERED_DICT) + b"(" + encode("a") + encode(tensor) + b"u"
    attributes = {"items": REBUILD, "get": REBUILD, "__setitem__": REBUILD}
    assert list(_read(tmp_path, _legacy_bytes(Build(Raw(filled), attributes), {"0": array}))) == ["a"]


@layouts
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2,), (4,), 0),
        ((2, 2), (1, 4), 0),
        ((1,), (1,), 4),
        ((2**40, 2**40), (0, 0), 0),
        ((1000,), (0,), 0),
    ],
)
def test_tensors_beyond_their_storage(tmp_path, layout, size, stride, offset):
    root = {"w": _tensor(_storage("0", 4, legacy=layout == "legacy"), size, stride, offset)}
    _refused(
        tmp_path,
        WRITERS[layout](root, {"0": np.ones(4, np.float32)}),
        "'w' of shape .* reaches beyond its storage",
    )


@layouts
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((-1,), (1,), 0),
        ((1,), (-1,), 0),
        ((1,), (1,), -1),
        ((1, 1), (1,), 0),
        ((True,), (1,), 0),
        (("1",), (1,), 0),
        ((1,) * 40, (1,) * 40, 0),
        (3, (1,), 0),
    ],
)
def test_tensors_that_cannot_be(tmp_path, layout, size, stride, offset):
    root = {"w": _tensor(_storage("0", 4, legacy=layout == "legacy"), size, stride, offset)}
    _refused(tmp_path, WRITERS[layout](root, {"0": np.ones(4, np.float32)}), "impossible tensor 'w'")


@layouts
def test_storages_that_cannot_be(tmp_path, layout):
    legacy = layout == "legacy"
    array = np.ones(4, np.float32)

    def refused(storage, message):
        root = {"v": _contiguous(array, "0", legacy), "w": _tensor(storage, (1,), (1,))}
        _refused(tmp_path, WRITERS[layout](root, {"0": array}), message)

    refused(_storage("0", 4, "int32", legacy=legacy), "storage '0' in two ways")
    refused(_storage("1", 4, legacy=legacy), "lists other storages|lacks the storage '1'")
    refused(
        _storage("../../data.pkl", 4, legacy=legacy),
        "lists other storages|lacks the storage '../../data.pkl'",
    )
    refused(_storage("0", -4, legacy=legacy), "impossible storage")
    refused(Persistent(("storage", "FloatStorage", "0", "cpu", 4)), "impossible storage")
    refused(Persistent(("module", REBUILD, "model.py", "import os", None)), "refers to a 'module'")
    refused(Persistent("text"), "refers to a 'text'")
    refused("text", "impossible tensor 'w'")


def test_absurd_number_of_elements(tmp_path):
    root = {"w": _tensor(_storage("0", 2**60), (1,), (1,))}
    array = np.ones(4, np.float32)
    _refused(tmp_path, _legacy_bytes(root, {"0": array}), f"storage '0' has 4 elements, but {2**60}")
    data = _legacy_bytes(root, {"0": array})[: -4 * 4 - 8] + struct.pack("<q", 2**60)
    _refused(tmp_path, data, "ends inside storage '0'")
    root = {"w": _tensor(_storage("0", 2**60, legacy=False), (1,), (1,))}
    _refused(tmp_path, _zip_bytes(root, {"0": array}), f"storage '0' has 16 bytes, not {2**60}")


@layouts
def test_every_truncation_is_noticed(tmp_path, layout):
    array = np.arange(3, dtype=np.float32)
    data = WRITERS[layout]({"w": _contiguous(array, "0", layout == "legacy")}, {"0": array})
    path = tmp_path / "weights.pth"
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(WeightFileError, match=r"weights\.pth: "):
            read_torch_file(path)


def test_a_flipped_byte_in_a_zip_storage_is_noticed(tmp_path):
    array = np.full(3, 1.2345, np.float32)
    data = _zip_bytes({"w": _contiguous(array, "0", legacy=False)}, {"0": array})
    flipped = data.replace(array.tobytes(), b"\xff" + array.tobytes()[1:])
    _refused(tmp_path, flipped, "damaged")


def test_big_endian_is_refused(tmp_path):
    array = np.ones(1, np.float32)
    root = {"w": _contiguous(array, "0", legacy=True)}
    _refused(tmp_path, _legacy_bytes(root, {"0": array}, little_endian=False), "little-endian")
    _refused(tmp_path, _zip_bytes(root, {"0": array}, byte_order=b"big"), "little-endian")


def test_other_protocol_is_refused(tmp_path):
    _refused(tmp_path, _legacy_bytes({}, {}, version=1002), "protocol version 1002")


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", pickle.dumps({"w": 1}), b"\x93NUMPY\x01\x00"])
def test_other_files_are_refused(tmp_path, data):
    _refused(tmp_path, data, "is not a file of torch.save")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_tricks(tmp_path):
    array = np.zeros(4096, np.float32)
    root = {"w": _contiguous(array, "0", legacy=False)}
    _refused(tmp_path, _zip_bytes(root, {"0": array}, compression=zipfile.ZIP_DEFLATED), "compressed")
    _refused(
        tmp_path, _zip_bytes(root, {"0": array}, extra=[("archive/data/0", b"")]), "two members of one name"
    )
    _refused(tmp_path, _zip_bytes(root, {"0": array}, extra=[("b/data.pkl", b"")]), "without one data.pkl")
    # A member whose sizes in the central directory are blown up, as in overlapping bombs.
    data = _zip_bytes(root, {"0": array})
    entry = data.rindex(b"PK\x01\x02")
    sizes = struct.pack("<II", 2**31, 2**31)
    _refused(tmp_path, data[: entry + 20] + sizes + data[entry + 28 :], "claims more bytes")
    # Names that point elsewhere are only names: nothing is written anywhere.
    read = _read(tmp_path, _zip_bytes(root, {"0": array}, extra=[("../../evil", b"x"), ("/evil", b"x")]))
    assert list(read) == ["w"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Nr\xff\xff\xff\xff",  # LONG_BINPUT: 64 GiB of memo slots in the C unpickler
        b"\x96" + struct.pack("<Q", 2**45),  # BYTEARRAY8: zero-filled before it is read
        b"\x8e" + struct.pack("<Q", 2**45),  # BINBYTES8
        b"(" * 5000,
    ],
)
def test_memory_bombs(tmp_path, opcodes):
    _refused(tmp_path, _legacy_bytes(Raw(opcodes), {}), "damaged|no dictionary of tensors")


def _repeated(call, times):
    """Opcodes that store `call`'s function and arguments once and call it over and over."""
    arguments = encode(call.args)
    return Raw(
        b"](" + encode(call.function) + b"q\x01" + arguments + b"q\x02R" + b"h\x01h\x02R" * times + b"e"
    )


def test_copies_of_copies(tmp_path):
    # Tens of thousands of entries copied as often.
    for call in (
        Call(Global("torch", "Size"), (Raw(b"](" + b"N" * 2**16 + b"e"),)),
        Call(Global("collections", "OrderedDict"), (Raw(b"](" + b")" * 2**16 + b"e"),)),
    ):
        _refused(tmp_path, _legacy_bytes(_repeated(call, 30_000), {}), "damaged")
    state = encode(ORDERED_DICT) + b"q\x01" + encode({str(i): i for i in range(5_000)}) + b"q\x02b"
    _refused(tmp_path, _legacy_bytes(Raw(state + b"h\x02b" * 30_000), {}), "copied over and over")


def test_names_that_swell(tmp_path):
    array = np.ones(1, np.float32)
    tensor = _contiguous(array, "0", legacy=True)
    for name in ("a" * 1001, "a\nb", "\x1b[2J"):
        _refused(tmp_path, _legacy_bytes({name: tensor}, {"0": array}), "holds the absurd name")
        _refused(tmp_path, _legacy_bytes({name: {"b": tensor}}, {"0": array}), "holds the absurd name")


def test_messages_stay_short_and_print(tmp_path):
    evil = Raw(b"c" + b"x" * 5000 + b"\x1b[2J\nf\n")
    for root in (evil, {"w": Raw(b"X" + struct.pack("<I", 5000) + b"\xff" * 5000)}):
        with pytest.raises(WeightFileError) as error:
            _read(tmp_path, _legacy_bytes(root, {}))
        assert len(str(error.value)) < 600 + len(str(tmp_path))
        assert str(error.value).isprintable()


def test_numbers_beyond_64_bits(tmp_path):
    array = np.ones(4, np.float32)
    huge = 1 << 1000
    for tensor in (
        _tensor(_storage("0", 4), (huge,), (1,)),
        _tensor(_storage("0", 4), (1,), (huge,)),
        _tensor(_storage("0", 4), (1,), (1,), huge),
        _tensor(_storage("0", huge), (1,), (1,)),
    ):
        _refused(tmp_path, _legacy_bytes({"w": tensor}, {"0": array}), "impossible")


def test_instances_of_classes_are_refused(tmp_path):
    for opcodes in (
        b"(icollections\nOrderedDict\n",
        b"(ccollections\nOrderedDict\no",
        b"ctorch\nSize\n)\x81",
    ):
        _refused(tmp_path, _legacy_bytes({"w": Raw(opcodes)}, {}), "damaged")


def test_endless_dictionaries(tmp_path):
    # Each level names the one inside it under two keys: 2^40 leaves from a few hundred bytes.
    levels = b"}q\x00"
    for number in range(1, 41):
        inner = b"h" + bytes([number - 1])
        levels += b"}q" + bytes([number]) + b"(" + encode("a") + inner + encode("b") + inner + b"u"
    _refused(tmp_path, _legacy_bytes(Raw(levels), {}), "without end")
    _refused(tmp_path, _legacy_bytes(Raw(b"}q\x00(" + encode("a") + b"h\x00u"), {}), "without end")


def test_keys_whose_hash_takes_forever(tmp_path):
    # A pair of one pair of one pair ...: 60 levels from 180 bytes, with 2^60 leaves to hash.
    key = b")" + b"2\x86" * 60
    for opcodes in (b"}" + key + b"K\x01s", b"}(" + key + b"K\x01u", b"\x8f(" + key + b"\x90"):
        _refused(tmp_path, _legacy_bytes(Raw(opcodes), {}), "damaged")
    pairs = Raw(b"](" + b"(" + key + b"K\x01te")
    ordered = Call(Global("collections", "OrderedDict"), (pairs,))
    _refused(tmp_path, _legacy_bytes(ordered, {}), "damaged")
    header = dump(MAGIC_NUMBER) + b"\x80\x02" + key + b"."
    _refused(tmp_path, header, "protocol version tuple")
    _refused(tmp_path, _legacy_bytes(Persistent(Raw(key)), {}), "refers to a tuple")


def test_colliding_names(tmp_path):
    array = np.ones(1, np.float32)
    tensor = _contiguous(array, "0", legacy=True)
    _refused(
        tmp_path, _legacy_bytes({"a.b": tensor, "a": {"b": tensor}}, {"0": array}), "two tensors named 'a.b'"
    )


@layouts
@pytest.mark.parametrize("root", [{}, {"epoch": 3}, [1, 2], "text"])
def test_no_tensors(tmp_path, layout, root):
    _refused(tmp_path, WRITERS[layout](root, {}), "no dictionary of tensors")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(WeightFileError, match=r"absent\.pth: cannot be read"):
        read_torch_file(tmp_path / "absent.pth")
    with pytest.raises(WeightFileError, match="cannot be read"):
        read_torch_file(tmp_path)


def test_torch_is_not_imported(tmp_path):
    write_zip(tmp_path / "weights.pth", {"w": np.ones(1, np.float32)})
    read_torch_file(tmp_path / "weights.pth")
    assert "torch" not in sys.modules
