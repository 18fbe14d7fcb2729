"""Reader of pickled NumPy arrays, the weight files (`.pkl`) of Detectron and of detectron2's model zoo.

Detectron's files are from Python 2 (cPickle, protocol 2), whose byte strings, such as the bytes of an array, are read
as Latin-1 text. `{'blobs': {...}, 'cfg': ...}`, `{'model': {...}, '__author__': ...}` and plain dictionaries are read
in the same way. The file cannot call any function of NumPy: arrays and dtypes are rebuilt here from their description.
"""

import math
import os
import pickle
from typing import Any

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

REMEDY = "save its arrays again, as a plain dictionary of numpy arrays"
# Pickles of protocol 2 and later, and of protocol 0 and 1 with a dictionary first.
PICKLE_STARTS = (b"\x80", b"(d", b"}")
NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def read_detectron_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a pickled dictionary by name, as read-only arrays.

    If there is a dictionary of arrays under 'blobs', 'model' or another name of `WRAPPERS`, only that one is read.
    Entries that are not arrays are left out.

    Raises:
        WeightFileError: the file is missing, truncated, damaged, in another format, or asks for anything but
            arrays, numbers, strings and plain containers.
    """
    return arrays_of(load_numpy_pickle(path), os.fspath(path))


def arrays_of(root: Any, path: str) -> dict[str, np.ndarray]:
    """Returns the arrays in a result of `load_numpy_pickle`; see `read_detectron_file`."""
    leaves = named_leaves(root, (_Array, np.ndarray), path=path, remedy=REMEDY)
    arrays = {}
    for name, leaf in leaves.items():
        array = leaf.value if isinstance(leaf, _Array) else leaf
        if array is None:
            raise WeightFileError(f"{path}: describes an array {name!r} without contents; {FETCH}.")
        arrays[name] = array
    return arrays


def load_numpy_pickle(path: str | os.PathLike) -> Any:
    """Returns the unpickled content of a file; `arrays_of` finds the arrays in it."""
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            if not start.startswith(PICKLE_STARTS):
                raise WeightFileError(
                    f"{path}: is not a pickle (it begins with {start!r}); point to a .pkl file of weights."
                )
            file.seek(0)
            size = os.fstat(file.fileno()).st_size
            return RestrictedUnpickler(
                file, path, size=size, admitted=ADMITTED, encoding="latin1", remedy=REMEDY
            ).load()
    except WeightFileError:
        raise
    except _RefusedDtypeError as error:
        raise WeightFileError(f"{path}: refused to load an array of {error}; {REMEDY}.") from error
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error}); check the path.") from error
    except Exception as error:
        raise damaged(path, error) from error


class _RefusedDtypeError(Exception):
    pass


class _Dtype:
    """A dtype of plain numbers; the pickle sets its byte order later."""

    __slots__ = ("value",)

    def __init__(self, value: np.dtype):
        self.value = value

    def __setstate__(self, state):
        _, order, subtype, names, fields = state[:5]
        if (subtype, names, fields) != (None, None, None):
            raise _RefusedDtypeError("records")
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a dtype has an unknown byte order")
        self.value = self.value.newbyteorder(order)


class _Array:
    """An array whose shape, dtype and bytes the pickle sets later."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = None

    def __setstate__(self, state):
        shape, dtype, is_fortran, raw = state[-4:]
        self.value = _array(raw, dtype, shape, "F" if is_fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or not all(map(is_count, shape)):
        raise pickle.UnpicklingError("an array has no shape or no dtype")
    if not isinstance(raw, str | bytes | bytearray):
        raise pickle.UnpicklingError("an array has no contents")
    raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    if len(raw) != math.prod(shape) * dtype.value.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {shape} has {len(raw)} bytes")
    array = np.frombuffer(raw, dtype.value).reshape(shape, order=order)
    return array if dtype.value.isnative else _read_only(array.astype(dtype.value.newbyteorder("=")))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


# A pickle may set attributes of every object that it can name. Instances without a __dict__ have none.
class _MakeDtype:
    __slots__ = ()

    def __call__(self, name, align=False, copy=False):
        if name not in NUMBERS:
            # In a damaged file the name may be the whole content.
            raise _RefusedDtypeError(f"dtype {name[:20]!a}" if isinstance(name, str) else "another dtype")
        return _Dtype(np.dtype(name))


class _NDArray:
    __slots__ = ()


class _Reconstruct:
    __slots__ = ()

    def __call__(self, subtype, shape, typecode):
        if not isinstance(subtype, _NDArray):
            raise pickle.UnpicklingError("an array of another type than numpy.ndarray")
        return _Array()


class _FromBuffer:
    __slots__ = ()

    def __call__(self, raw, dtype, shape, order, axis_order=None):
        if axis_order is not None:
            return _array(raw, dtype, shape, "C").transpose(axis_order)
        return _array(raw, dtype, shape, order)


class _Scalar:
    __slots__ = ()

    def __call__(self, dtype, raw):
        return _array(raw, dtype, (), "C").item()


# Bytes as Python 3 writes them for Python 2.
class _Encode:
    __slots__ = ()

    def __call__(self, text, encoding):
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("bytes in another encoding than Latin-1")
        return text.encode("latin1")


class _EmptyBytes:
    __slots__ = ()

    def __call__(self):
        return b""


ADMITTED = {
    ("collections", "OrderedDict"): OrderedDictMaker(),
    ("numpy", "ndarray"): _NDArray(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
    ("__builtin__", "bytes"): _EmptyBytes(),
}
# NumPy 2 moved its modules.
for _package in ("numpy.core", "numpy._core"):
    ADMITTED[f"{_package}.multiarray", "_reconstruct"] = _Reconstruct()
    ADMITTED[f"{_package}.multiarray", "scalar"] = _Scalar()
    ADMITTED[f"{_package}.numeric", "_frombuffer"] = _FromBuffer()
