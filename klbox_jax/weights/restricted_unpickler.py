"""Unpickles weight files without running anything from them.

A pickle is a program. Here it may build plain containers, numbers and strings, and name what the reader of its
format admits; every other name is refused. What is admitted has no attributes to set and does nothing but
describe a tensor, so that neither a call nor a change of it outlives the reading.
"""

import collections
import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

FETCH = "fetch or copy the file again"

# Far above any real checkpoint; a nested dictionary may name one inner dictionary exponentially often.
MAX_ENTRIES = 1_000_000
MAX_DEPTH = 16
MAX_NAME_LENGTH = 1000
MAX_REASON_LENGTH = 200
# Every call copies what it is given, so a file may not give the same thing over and over: all arguments together may
# be so many times as long as the file, and so much more.
MAX_COPIES = 8
FREE_COPIES = 2**20
# Dictionaries that stand for the whole file, in the order in which they may nest.
WRAPPERS = ("state_dict", "model", "blobs")

# Sets would hash what they hold, the next call into registries and buffers outside of the file, and the last build
# instances of classes, of which there are none here.
_REFUSED_OPCODES = (
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.NEWOBJ, pickle.NEWOBJ_EX),
)


class WeightFileError(ValueError):
    """A weight file cannot be used; the message names the file, the reason and the remedy."""


# The C unpickler allocates as many slots as the file asks for (64 GiB from a dozen bytes); the Python one
# keeps its memo in a dictionary.
class RestrictedUnpickler(pickle._Unpickler):
    """Builds plain containers and what `admitted` names.

    Args:
        file: positioned at a pickle.
        path: of the file, for messages.
        size: bytes of the pickle, or of the file that it lies in.
        admitted: what a pair of module and name stands for. Values must have no attributes to set.
        encoding: of the byte strings of Python 2.
        remedy: what to do about a file that names anything else.

    Raises:
        WeightFileError: on `load`, a name is not admitted.
        Exception: on `load`, of any kind: the pickle is damaged.
    """

    dispatch = {  # noqa: RUF012
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in _REFUSED_OPCODES
    }

    def __init__(
        self,
        file: BinaryIO,
        path: str,
        *,
        size: int,
        admitted: Mapping[tuple[str, str], Any],
        encoding: str,
        remedy: str,
    ):
        super().__init__(file, encoding=encoding)
        self._path = path
        self._admitted = admitted
        self._remedy = remedy
        self._copies_left = FREE_COPIES + MAX_COPIES * size

    def find_class(self, module, name):
        """Returns what a name stands for, if it is admitted."""
        if (module, name) not in self._admitted:
            shown = ascii(f"{module}.{name}")[1:-1][:MAX_REASON_LENGTH]
            raise WeightFileError(
                f"{self._path}: refused to load {shown}, which is no part of a dictionary of tensors; "
                f"{self._remedy}."
            )
        return self._admitted[module, name]

    def load_reduce(self):
        """Calls what a name stands for."""
        self._spend(self.stack[-1])
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self):
        """Gives an object its state."""
        self._spend(self.stack[-1])
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def _instantiate(self, klass, args):
        # What the opcodes of Python 2's classes do with a name, once it was found.
        raise pickle.UnpicklingError("an instance of a class")

    def _spend(self, arguments):
        parts = arguments if isinstance(arguments, tuple) else (arguments,)
        self._copies_left -= sum(1 + (len(part) if hasattr(part, "__len__") else 0) for part in parts)
        if self._copies_left < 0:
            raise pickle.UnpicklingError("the same contents are copied over and over")

    def load_bytearray8(self):
        """Reads a byte array as bytes."""
        # The inherited one fills the announced length with zeros before a byte of it is read.
        self.load_binbytes8()

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def load_setitem(self):
        """Adds one entry to a dictionary."""
        require_plain_keys(self.stack[-2:-1])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self):
        """Adds several entries to a dictionary."""
        require_plain_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems


def require_plain_keys(keys: list) -> None:
    """Raises `UnpicklingError` for a key whose hash may take forever, as that of a tuple of tuples does."""
    if not all(isinstance(key, str | bytes | int | float | None) for key in keys):
        raise pickle.UnpicklingError("a dictionary has a key that is neither a string nor a number")


class OrderedDictMaker:
    """What `collections.OrderedDict` stands for in a pickle."""

    __slots__ = ()

    def __call__(self, items=()):
        """Returns an ordered dictionary of pairs."""
        items = [(key, value) for key, value in items]
        require_plain_keys([key for key, _ in items])
        return collections.OrderedDict(items)


def named_leaves(root: Any, kinds: type | tuple[type, ...], *, path: str, remedy: str) -> dict[str, Any]:
    """Returns everything of one kind below `root` under its dotted name.

    A dictionary under 'state_dict', 'model' or 'blobs' is taken for the whole. Other entries are left out.

    Raises:
        WeightFileError: there is none, two have one name, or dictionaries nest without end.
    """
    leaves: dict[str, Any] = {}
    entries = 0

    def collect(node, prefix, depth):
        nonlocal entries
        # A pickle may hide a dictionary's own methods behind attributes of the instance.
        for key, value in dict.items(node):
            entries += 1
            if entries > MAX_ENTRIES or depth > MAX_DEPTH:
                raise WeightFileError(f"{path}: nests dictionaries without end; {remedy}.")
            if not isinstance(key, str):
                continue
            name = prefix + key
            if len(name) > MAX_NAME_LENGTH or not name.isprintable():
                raise WeightFileError(f"{path}: holds the absurd name {name[:40]!r}; {remedy}.")
            if isinstance(value, dict):
                collect(value, name + ".", depth + 1)
            elif isinstance(value, kinds):
                if name in leaves:
                    raise WeightFileError(f"{path}: holds two tensors named {name!r}; {remedy}.")
                leaves[name] = value

    if isinstance(root, dict):
        for wrapper in WRAPPERS:
            if isinstance(dict.get(root, wrapper), dict):
                root = dict.get(root, wrapper)
        collect(root, "", 0)
    if not leaves:
        raise WeightFileError(f"{path}: holds no dictionary of tensors; {remedy}.")
    return leaves


def is_count(value: Any) -> bool:
    """Whether `value` is an int from 0 on that 64 bits hold, and not a bool."""
    return type(value) is int and 0 <= value < 2**63


def damaged(path: str, error: Exception) -> WeightFileError:
    """Returns what to raise for whatever went wrong: damage shows in as many ways as a file has bytes."""
    # The text of some errors holds all that they failed on, as it stands in the file.
    reason = f"{type(error).__name__}: {error}"
    shown = "".join(c if c.isprintable() else " " for c in reason[:MAX_REASON_LENGTH])
    return WeightFileError(f"{path}: is damaged or truncated ({shown}); {FETCH}.")
