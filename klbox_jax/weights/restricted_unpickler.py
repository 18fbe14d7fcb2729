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
# Dictionaries that stand for the whole file, in the order in which they may nest.
WRAPPERS = ("state_dict", "model", "blobs")

# Sets would hash what they hold, and the others call into registries and buffers outside of the file.
_REFUSED_OPCODES = (
    pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET + pickle.EXT1 + pickle.EXT2 + pickle.EXT4
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
        admitted: what a pair of module and name stands for. Values must have no attributes to set.
        encoding: of the byte strings of Python 2.
        remedy: what to do about a file that names anything else.

    Raises:
        WeightFileError: on `load`, a name is not admitted.
        Exception: on `load`, of any kind: the pickle is damaged.
    """

    dispatch = {  # noqa: RUF012
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in _REFUSED_OPCODES
    }

    def __init__(
        self,
        file: BinaryIO,
        path: str,
        *,
        admitted: Mapping[tuple[str, str], Any],
        encoding: str,
        remedy: str,
    ):
        super().__init__(file, encoding=encoding)
        self._path = path
        self._admitted = admitted
        self._remedy = remedy

    def find_class(self, module, name):
        """Returns what a name stands for, if it is admitted."""
        if (module, name) not in self._admitted:
            raise WeightFileError(
                f"{self._path}: refused to load {module}.{name}, which is no part of a dictionary of tensors; "
                f"{self._remedy}."
            )
        return self._admitted[module, name]

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
    """Whether `value` is an int from 0 on, and not a bool."""
    return type(value) is int and value >= 0
