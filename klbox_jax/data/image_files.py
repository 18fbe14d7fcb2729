"""Rules for the image files of a data set: links, and the check of every file before training."""

import dataclasses
import os

from klbox_jax.data.image import check_image
from klbox_jax.data.source import DataError, Fault

# Suffixes of the formats that `klbox_jax.data.image` decodes, in lower case.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp"),
    *(".bmp", ".dib", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Rules for accepting image files.

    Attributes:
        check: look at the header and the end of every file before training (0.1 ms each), not only when it is read.
        allow_links: accept links to files outside the data set's folder. Links that stay inside it are always
            accepted.
    """

    check: bool = True
    allow_links: bool = False


def real_folders(*folders: str) -> tuple[str, ...]:
    """Returns folders with their links resolved, for `leads_outside`."""
    return tuple(os.path.realpath(folder) + os.sep for folder in folders)


def leads_outside(path: str, folders: tuple[str, ...], rules: ImageRules) -> bool:
    """Returns True if a path, with its links resolved, is in none of `real_folders` and links are not allowed."""
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError):  # No file system accepts such a name.
        return True
    return not rules.allow_links and not real.startswith(folders)


def link_fault(path: str) -> Fault:
    """Returns the fault of an image file that is a link out of the data set's folder."""
    return Fault(
        kind="path out of the image folder",
        file=path,
        what="is a link to a file outside the data set's folder",
        remedy="Copy the file into the folder, or set config.data.allow_links = True if you trust the links.",
    )


def find_image_fault(path: str, *, height: int, width: int, rules: ImageRules) -> Fault | None:
    """Returns the fault of an image file of the given size, or None; without `rules.check`, looks at no file."""
    if not rules.check:
        return None
    try:
        check_image(path, height=height, width=width)
    except DataError as error:
        return error.fault
    return None
