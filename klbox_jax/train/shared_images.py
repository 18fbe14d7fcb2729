"""Finds images that two data sets share, by the path or by the content of their files."""

import hashlib
import os
from collections import defaultdict

from klbox_jax.data.source import Source


def count_shared_images(one: Source, other: Source) -> int:
    """Returns the number of images of `one` that are in `other` too.

    Two images are the same if their records have the same file name, or if their files have the same bytes. Images
    that are not in files, such as the scenes, are compared by name only.
    """
    names = {record.file_name for record in other.records}
    by_size = defaultdict(list)
    for record in other.records:
        size = _size(record.file_name)
        if size is not None:
            by_size[size].append(record.file_name)
    digests: dict[str, str] = {}

    def digest(path: str) -> str:
        if path not in digests:
            with open(path, "rb") as file:
                digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests[path]

    def is_shared(name: str) -> bool:
        if name in names:
            return True
        alike = by_size.get(_size(name), [])
        return bool(alike) and digest(name) in {digest(path) for path in alike}

    return sum(is_shared(record.file_name) for record in one.records)


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size if os.path.isfile(path) else None
    except OSError:
        return None
