"""Reader of the tensors of a file of `torch.save`, without torch and without running code from the file.

Both layouts are read: the old one (before torch 1.6: five pickles in a row, then the raw storages) and the zip archive
of today. Their pickles may only use the names of state dicts and of the states of optimizers and schedules, as
`torch.load(weights_only=True)` admits them; every other name is refused. The admitted names only build dictionaries,
tuples, descriptions of tensors, or nothing.
"""

import math
import os
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from klbox_jax.weights.restricted_unpickler import (
    FETCH,
    OrderedDictMaker,
    RestrictedUnpickler,
    WeightFileError,
    damaged,
    is_count,
    named_leaves,
)

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# The first bytes of each layout; in the old one PROTO 2, then LONG1 with the ten bytes of the number.
LEGACY_START = b"\x80\x02\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little")
ZIP_START = b"PK\x03\x04"
PROTOCOL_VERSION = 1001
RESAVE = "save its state_dict() again with torch.save"
MAX_DIMENSIONS = 32

STORAGE_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# torch's names of its dtypes, which scripts store with the tensors.
DTYPE_NAMES = (
    *("float64", "double", "float32", "float", "float16", "half", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *(
        "int64",
        "long",
        "int32",
        "int",
        "int16",
        "short",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ),
    *("complex32", "complex64", "complex128", "qint8", "quint8", "qint32"),
)


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by name, as read-only arrays that may share memory.

    If there is a dictionary of tensors under 'state_dict', 'model' or another name of `WRAPPERS`, only that one is
    read. Nested names are joined by dots; entries that are not tensors are left out.

    Raises:
        WeightFileError: the file is missing, truncated, damaged, in another format, written on a big-endian
            machine, or uses a name that is not admitted.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) == ZIP_START:
                root, storages = _read_zip(file, path)
            else:
                file.seek(0)
                root, storages = _read_legacy(file, path)
        tensors = named_leaves(root, _Tensor, path=path, remedy=RESAVE)
        return {name: _array(tensor, storages, name, path) for name, tensor in tensors.items()}
    except WeightFileError:
        raise
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error}); check the path.") from error
    except Exception as error:
        raise damaged(path, error) from error


class _Storage(NamedTuple):
    """A part of a storage; the pickle refers to it, and its bytes follow the pickle."""

    key: str
    offset: int
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple
    stride: tuple


# A pickle may set attributes of every object that it can name, and those of a function would remain after the call.
# Instances without a __dict__ have none.
class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage, offset, size, stride, *flags):
        # The flags are requires_grad, hooks and metadata.
        if len(flags) > 3:
            raise TypeError("a tensor with more arguments than torch writes")
        return _Tensor(storage, offset, size, stride)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data, requires_grad=False, hooks=None, state=None):
        return data


class _RebuildFromType:
    """Rebuilds a tensor with attributes, which are dropped."""

    __slots__ = ()

    def __call__(self, function, kind, arguments, state):
        if not isinstance(function, _RebuildTensor | _RebuildParameter) or not isinstance(arguments, tuple):
            raise TypeError("a tensor that is built by another function than torch's")
        return function(*arguments)


class _Nothing:
    """An object of the state of a schedule or an optimizer, which no tensor needs."""

    __slots__ = ()

    def __call__(self, *arguments):
        return None


class _StorageType:
    __slots__ = ("_dtype",)

    def __init__(self, dtype):
        object.__setattr__(self, "_dtype", dtype)

    def __setattr__(self, name, value):
        raise AttributeError(name)

    @property
    def dtype(self):
        return self._dtype


# The other names that torch.load(weights_only=True) reads in the state of a training.
IGNORED_NAMES = (
    *(("torch", name) for name in DTYPE_NAMES),
    *(
        ("torch", name)
        for name in ("Tensor", "device", "strided", "sparse_coo", "channels_last", "contiguous_format")
    ),
    ("collections", "Counter"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "complex", "bytearray")),
)
ADMITTED = (
    {name: _Nothing() for name in IGNORED_NAMES}
    | {
        ("collections", "OrderedDict"): OrderedDictMaker(),
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
        ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter(),
        ("torch._tensor", "_rebuild_from_type_v2"): _RebuildFromType(),
    }
    | {
        (module, name): _StorageType(dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in STORAGE_DTYPES.items()
    }
)


class _Unpickler(RestrictedUnpickler):
    """An unpickler of dictionaries and descriptions of tensors, which keeps each storage's dtype and length."""

    def __init__(self, file: BinaryIO, path: str, *, size: int):
        super().__init__(file, path, size=size, admitted=ADMITTED, encoding="utf-8", remedy=RESAVE)
        self.storages: dict[str, tuple[np.dtype, int]] = {}

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            kind = pid[0] if isinstance(pid, tuple) and pid else pid
            # The repr of a string only, because that of nested tuples may be endless.
            kind = repr(kind) if isinstance(kind, str) else type(kind).__name__
            raise WeightFileError(f"{self._path}: refers to a {kind} where only storages may be; {RESAVE}.")
        _, storage_type, key, _, numel = pid[:5]
        if not isinstance(storage_type, _StorageType) or not isinstance(key, str) or not is_count(numel):
            raise WeightFileError(f"{self._path}: describes an impossible storage; {FETCH}.")
        found = storage_type.dtype, numel
        if self.storages.setdefault(key, found) != found:
            raise WeightFileError(f"{self._path}: describes storage {key!r} in two ways; {RESAVE}.")
        view = pid[5] if len(pid) == 6 else None
        if view is None:
            return _Storage(key, 0, numel)
        _, offset, length = view
        if not is_count(offset) or not is_count(length) or offset + length > numel:
            raise WeightFileError(
                f"{self._path}: describes a view beyond the end of storage {key!r}; {FETCH}."
            )
        return _Storage(key, offset, length)


def _read_legacy(file: BinaryIO, path: str) -> tuple[Any, dict[str, np.ndarray]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(16)
    file.seek(0)
    if not start.startswith(LEGACY_START):
        raise WeightFileError(
            f"{path}: is not a file of torch.save (it begins with {start!r}); point to a .pth file."
        )
    _Unpickler(file, path, size=size).load()
    version = _Unpickler(file, path, size=size).load()
    if not is_count(version) or version != PROTOCOL_VERSION:
        shown = version if is_count(version) else type(version).__name__
        raise WeightFileError(f"{path}: has protocol version {shown}, not {PROTOCOL_VERSION}; {RESAVE}.")
    system = _Unpickler(file, path, size=size).load()
    if not isinstance(system, dict) or dict.get(system, "little_endian") is not True:
        raise WeightFileError(f"{path}: was not written on a little-endian machine; {RESAVE} on one.")
    unpickler = _Unpickler(file, path, size=size)
    root = unpickler.load()
    keys = _Unpickler(file, path, size=size).load()
    is_sound = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not is_sound or sorted(keys) != sorted(unpickler.storages):
        raise WeightFileError(f"{path}: lists other storages than its tensors use; {FETCH}.")

    storages = {}
    for key in keys:
        dtype, numel = unpickler.storages[key]
        (stored,) = struct.unpack("<q", file.read(8))
        if stored != numel:
            raise WeightFileError(
                f"{path}: storage {key!r} has {stored} elements, but {numel} are announced; {FETCH}."
            )
        if numel * dtype.itemsize > size - file.tell():
            raise WeightFileError(f"{path}: ends inside storage {key!r} of {numel} elements; {FETCH}.")
        storages[key] = np.frombuffer(file.read(numel * dtype.itemsize), dtype)
    return root, storages


def _read_zip(file: BinaryIO, path: str) -> tuple[Any, dict[str, np.ndarray]]:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise WeightFileError(f"{path}: holds two members of one name; {RESAVE}.")
        # torch does not compress its members, so compression is an attack or the work of another program.
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in members.values()):
            raise WeightFileError(
                f"{path}: holds compressed or encrypted members, which torch never writes; {RESAVE}."
            )
        if sum(info.file_size for info in members.values()) > size:
            raise WeightFileError(f"{path}: claims more bytes than it has; {FETCH}.")
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightFileError(
                f"{path}: is a zip archive without one data.pkl of torch.save; point to a .pth file."
            )
        folder = pickles[0].removesuffix("data.pkl")
        byte_order = members.get(folder + "byteorder")
        if byte_order is not None and archive.read(byte_order) != b"little":
            raise WeightFileError(f"{path}: was not written on a little-endian machine; {RESAVE} on one.")
        with archive.open(members[pickles[0]]) as data:
            unpickler = _Unpickler(data, path, size=members[pickles[0]].file_size)
            root = unpickler.load()

        storages = {}
        for key, (dtype, numel) in unpickler.storages.items():
            info = members.get(f"{folder}data/{key}")
            if info is None:
                raise WeightFileError(f"{path}: lacks the storage {key!r} that a tensor uses; {FETCH}.")
            if info.file_size != numel * dtype.itemsize:
                raise WeightFileError(
                    f"{path}: storage {key!r} has {info.file_size} bytes, not {numel} x {dtype}; {FETCH}."
                )
            storages[key] = np.frombuffer(archive.read(info), dtype)
    return root, storages


def _array(tensor: _Tensor, storages: dict[str, np.ndarray], name: str, path: str) -> np.ndarray:
    """Checks that a described tensor stays inside its storage, and returns the strided view."""
    storage, offset, size, stride = tensor
    is_sound = (
        isinstance(storage, _Storage)
        and isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= MAX_DIMENSIONS
        and all(map(is_count, (offset, *size, *stride)))
    )
    if not is_sound:
        raise WeightFileError(f"{path}: describes an impossible tensor {name!r}; {FETCH}.")
    values = storages[storage.key][storage.offset : storage.offset + storage.numel]
    if math.prod(size) == 0:
        return np.empty(size, values.dtype)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    # The number of elements is checked too, because strides of zero could expand one element to any size.
    if last >= storage.numel or math.prod(size) > storage.numel:
        raise WeightFileError(f"{path}: tensor {name!r} of shape {size} reaches beyond its storage; {FETCH}.")
    steps = tuple(
        step * values.itemsize if count > 1 else 0 for count, step in zip(size, stride, strict=True)
    )
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)
