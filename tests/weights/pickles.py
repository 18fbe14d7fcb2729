"""A pickler of our own, opcode by opcode: it can name torch's classes without torch, and hostile ones.

It writes what Python 2 writes too: `OldString` is its byte string, `old_array` its NumPy array.
"""

import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Any
    args: tuple


class Build(NamedTuple):
    target: Any
    state: Any


class Persistent(NamedTuple):
    pid: Any


class Raw(NamedTuple):
    opcodes: bytes


class OldString(NamedTuple):
    value: bytes


def encode(value):
    match value:
        case Raw(opcodes):
            return opcodes
        case OldString(value):
            short = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
            return short + value
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, args):
            return encode(function) + encode(args) + b"R"
        case Build(target, state):
            return encode(target) + encode(state) + b"b"
        case Persistent(pid):
            return encode(pid) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            length = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    raise TypeError(value)


def dump(value):
    return b"\x80\x02" + encode(value) + b"."


ORDERED_DICT = Call(Global("collections", "OrderedDict"), ())


def old_array(array: np.ndarray) -> Build:
    """A NumPy array as cPickle of Python 2 writes it."""
    code = OldString(f"{array.dtype.kind}{array.dtype.itemsize}".encode())
    order = "|" if array.dtype.itemsize == 1 else "<" if array.dtype.newbyteorder("<") == array.dtype else ">"
    dtype = Build(
        Call(Global("numpy", "dtype"), (code, 0, 1)),
        (3, OldString(order.encode()), None, None, None, -1, -1, 0),
    )
    is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    raw = OldString(array.tobytes("F" if is_fortran else "C"))
    empty = Call(
        Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), OldString(b"b"))
    )
    return Build(empty, (1, array.shape, dtype, is_fortran, raw))


def write_old_pickle(
    path: pathlib.Path, blobs: dict[str, np.ndarray], config: str | None = None
) -> pathlib.Path:
    """Writes arrays the way Detectron does; without a config as a plain dictionary, as its oldest files are."""
    root = {OldString(name.encode()): old_array(array) for name, array in blobs.items()}
    if config is not None:
        root = {OldString(b"blobs"): root, OldString(b"cfg"): OldString(config.encode())}
    path.write_bytes(dump(root))
    return path
