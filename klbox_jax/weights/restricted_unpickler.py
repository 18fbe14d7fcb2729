"""Unpickling of weight files without running code from them.

A pickle is a program. Here it may build plain containers, numbers and strings, and use the names that the reader of
its format admits; every other name is refused. The admitted objects have no attributes that a file could set, and
only describe a tensor, so no call and no change has an effect after the reading.
"""

import collections
import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

FETCH = "fetch or copy the file again"

# Far above any real checkpoint; nested dictionaries may contain one inner dictionary exponentially often.
MAX_ENTRIES = 1_000_000
MAX_DEPTH = 16
MAX_NAME_LENGTH = 1000
MAX_REASON_LENGTH = 200
# Every call copies its arguments, so a file must not pass the same large argument again and again. All arguments
# together may have MAX_COPIES times the length of the file, and FREE_COPIES more.
MAX_COPIES = 8
FREE_COPIES = 2**20
# Names under which training scripts store the tensors of a network, in order of preference: averaged ones are read if
# there are no others.
WRAPPERS = (
    *(
        "state_dict",
        "model_state_dict",
        "model_state",
        "model",
        "network",
        "net",
        "weights",
        "params",
        "blobs",
    ),
    *("module", "ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model"),
)
# Beginnings of the names of other states that a script stores next to the network's.
_OTHER_STATES = ("optim", "lr_", "sched", "scaler", "amp", "hyper", "callbacks", "loops")

# Refused: sets, which hash their elements; registries and buffers outside the file; and instances of classes.
_REFUSED_OPCODES = (
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.NEWOBJ, pickle.NEWOBJ_EX),
)


class WeightFileError(ValueError):
    """A weight file cannot be used; the message names the file, the reason and the remedy."""


# The C unpickler allocates as many memo slots as the file says (64 GiB from a dozen bytes); the Python one has its
# memo in a dictionary.
class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler of plain containers and `admitted` names.

    Args:
        file: positioned at a pickle.
        path: path of the file, for messages.
        size: bytes of the pickle, or of the file that contains it.
        admitted: the object for each pair of module and name. The objects must have no attributes that can be set.
        encoding: encoding of the byte strings of Python 2.
        remedy: the remedy in the message about a file that uses another name.

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
        """Returns the object of a name; raises WeightFileError if the name is not admitted."""
        if (module, name) not in self._admitted:
            shown = ascii(f"{module}.{name}")[1:-1][:MAX_REASON_LENGTH]
            raise WeightFileError(
                f"{self._path}: refused to load {shown}, which is not part of a dictionary of tensors; "
                f"{self._remedy}."
            )
        return self._admitted[module, name]

    def load_reduce(self):
        """Calls an admitted object."""
        self._spend(self.stack[-1])
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self):
        """Gives an object its state."""
        self._spend(self.stack[-1])
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def _instantiate(self, klass, args):
        # The opcodes of Python 2's classes call this method.
        raise pickle.UnpicklingError("an instance of a class")

    def _spend(self, arguments):
        parts = arguments if isinstance(arguments, tuple) else (arguments,)
        self._copies_left -= sum(1 + (len(part) if hasattr(part, "__len__") else 0) for part in parts)
        if self._copies_left < 0:
            raise pickle.UnpicklingError("the same contents are copied over and over")

    def load_bytearray8(self):
        """Reads a byte array as bytes."""
        # The inherited method allocates the announced length before it reads a byte.
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
    """Raises `UnpicklingError` for a key other than strings and numbers, whose hash may take forever."""
    if not all(isinstance(key, str | bytes | int | float | None) for key in keys):
        raise pickle.UnpicklingError("a dictionary has a key that is neither a string nor a number")


class OrderedDictMaker:
    """The object for `collections.OrderedDict` in a pickle."""

    __slots__ = ()

    def __call__(self, items=()):
        """Returns an ordered dictionary of pairs."""
        items = [(key, value) for key, value in items]
        require_plain_keys([key for key, _ in items])
        return collections.OrderedDict(items)


def named_leaves(root: Any, kinds: type | tuple[type, ...], *, path: str, remedy: str) -> dict[str, Any]:
    """Returns all objects of some kinds below `root` by their dotted names.

    If there is a dictionary with such objects under a name of `WRAPPERS`, only that one is read. Otherwise the states
    of optimizers and schedules are left out.

    Raises:
        WeightFileError: there is none, two have one name, or dictionaries nest without end.
    """
    leaves: dict[str, Any] = {}
    entries = 0

    def collect(node, prefix, depth):
        nonlocal entries
        # `dict.items`, because a pickle may hide a dictionary's own methods behind attributes of the instance.
        for key, value in dict.items(node):
            entries += 1
            if entries > MAX_ENTRIES or depth > MAX_DEPTH:
                raise WeightFileError(f"{path}: nests dictionaries without end; {remedy}.")
            if not isinstance(key, str) or (depth == 0 and isinstance(value, dict) and _is_other_state(key)):
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
        for _ in range(MAX_DEPTH):
            inner = (dict.get(root, wrapper) for wrapper in WRAPPERS)
            inner = (node for node in inner if isinstance(node, dict) and _has_leaf(node, kinds))
            if (node := next(inner, None)) is None:
                break
            root = node
        collect(root, "", 0)
    if not leaves:
        raise WeightFileError(f"{path}: holds no dictionary of tensors; {remedy}.")
    return leaves


def _is_other_state(key: str) -> bool:
    return key.lower().startswith(_OTHER_STATES)


def _has_leaf(root: dict, kinds: type | tuple[type, ...]) -> bool:
    """Returns True if an object of some kinds is among the first entries below `root`."""
    waiting, looked_at = [root], 0
    while waiting and looked_at < MAX_ENTRIES:
        node = waiting.pop()
        for value in dict.values(node):
            looked_at += 1
            if isinstance(value, kinds):
                return True
            if isinstance(value, dict):
                waiting.append(value)
    return False


def is_count(value: Any) -> bool:
    """Returns True for an int of at most 64 bits that is not negative, and not a bool."""
    return type(value) is int and 0 <= value < 2**63


def damaged(path: str, error: Exception) -> WeightFileError:
    """Returns the error for any exception of a reader, because damage can cause every type of exception."""
    # The text of some errors contains a whole part of the file.
    reason = f"{type(error).__name__}: {error}"
    shown = "".join(c if c.isprintable() else " " for c in reason[:MAX_REASON_LENGTH])
    return WeightFileError(f"{path}: is damaged or truncated ({shown}); {FETCH}.")
