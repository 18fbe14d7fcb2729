"""Paths that a user gives: `~` is the home folder, and paths of other machines are refused."""

import os
import re

from klbox_jax.errors import WorkdirError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | os.PathLike, what: str) -> str:
    """Returns a path of this machine, with the home folder for a leading `~`.

    Args:
        path: as the user wrote it.
        what: name of the flag or field, for the message.

    Raises:
        WorkdirError: the path has a scheme such as `gs://`, which no part of this package can read or write.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        raise WorkdirError(
            f"{what} = {text!r} is not a path of this machine, and {text.partition(':')[0]}: cannot be read or "
            "written; give a local path, such as the folder at which the bucket is mounted"
        )
    return os.path.expanduser(text)
