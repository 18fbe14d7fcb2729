"""Reads and writes files: JSON, atomic writes, the cache folder, and errors as one sentence.

Every part of the package may use it.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from klbox_jax.errors import WorkdirError


@contextlib.contextmanager
def as_workdir_error(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError inside the block, such as of a full disk or a read-only folder, into a `WorkdirError`."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be written: {error.strerror or error}; free space on its disk, or make it writable, and "
            "start again: the same command goes on from the last checkpoint"
        ) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically: readers see the old file or the new one, also after a kill.

    NumPy numbers and arrays are written as plain ones. Makes the folder if it is missing.

    Raises:
        ValueError: the value has a part that JSON cannot represent, such as NaN or infinity.
        WorkdirError: the disk is full, or the folder cannot be written to.
    """
    path = pathlib.Path(path)
    write_atomically(path, to_json(value, path) + "\n")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces the text of a file in one step; raises WorkdirError if that is not possible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with as_workdir_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its content is not JSON; the message names the file.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # covers bytes that are not UTF-8
        raise ValueError(f"{path} is not readable as JSON ({error})") from None


def to_json(value: Any, path: pathlib.Path) -> str:
    """Returns JSON text, with NumPy numbers and arrays as plain ones; ValueError for other types names `path`."""
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def cache_folder() -> pathlib.Path:
    """Returns the folder of this user's prepared data sets and compiled programs."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "klbox_jax"
