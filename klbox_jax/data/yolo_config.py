"""Reader of YOLO's `data.yaml`: the class names and the places of the images of each split."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import yaml

from klbox_jax.data.coco_entries import is_class_name
from klbox_jax.data.source import DataError, Fault, shown
from klbox_jax.data.text_files import read_text

_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
# Enough for the names of ten thousand classes.
_MAX_BYTES = 2**18
_MAX_CLASSES = 10_000
_MAX_DEPTH = 20
_SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YoloConfig:
    """The content of `data.yaml`.

    Attributes:
        path: the file.
        class_names: name of each class, by its index.
        splits: for each split the paths of its folders, lists or images, inside the data set's folder.
    """

    path: str
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]


def find_yolo_config(root: str | os.PathLike) -> str | None:
    """Returns the path of a folder's `data.yaml`, or None."""
    paths = (os.path.join(root, name) for name in _NAMES)
    return next((path for path in paths if os.path.isfile(path)), None)


def read_yolo_config(path: str, *, allow_links: bool = False) -> YoloConfig:
    """Reads and checks a `data.yaml`.

    Paths are relative to `path` in the file, or to the file's folder. Roboflow writes `../train/images` for
    `train/images`; such a path is read without its `../` if it would lead out of the folder.

    Args:
        path: the file.
        allow_links: accept folders that links put outside the data set's folder.

    Raises:
        DataError: the file cannot be read, has no valid `names`, or a path leads out of its folder.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise _error(path, "does not hold a mapping of `names`, `train` and `val`", "Export it again.")
    class_names = _class_names(path, content)
    root = os.path.dirname(os.path.abspath(path))
    base = content.get("path", "")
    if not isinstance(base, str):
        raise _error(
            path, f"has {shown(base)} as its 'path', not a text", "Set it to a folder, or remove it."
        )
    splits = {}
    for split in _SPLITS:
        places = content.get(split)
        if places in (None, "", []):
            continue
        places = places if isinstance(places, list) else [places]
        if not all(isinstance(place, str) and place and "\0" not in place for place in places):
            raise _error(
                path, f"has {shown(places)} as its '{split}', not a path", "Set it to a folder of images."
            )
        splits[split] = tuple(
            _inside(path, root, base, place, split=split, allow_links=allow_links) for place in places
        )
    if not splits:
        raise _error(path, "names no images under 'train', 'val' or 'test'", "Add them.")
    return YoloConfig(path=path, class_names=class_names, splits=splits)


def _load(path: str) -> Any:
    text = read_text(path, _MAX_BYTES, severity="fatal")
    depth = 0
    try:
        # Events come one by one, so that a deep file, which PyYAML reads in quadratic time, is refused early.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # With aliases a small file can have an endless content, and no data.yaml needs one.
            if isinstance(event, yaml.AliasEvent):
                raise _error(path, "has YAML aliases, which it does not need", "Write the values out.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise _error(path, "is not valid YAML: nested too deeply", "Restore or export it again.")
        return yaml.load(text, Loader=yaml.SafeLoader)
    except DataError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        reason = (
            " ".join(str(error).split())[:200]
            if not isinstance(error, RecursionError)
            else "nested too deeply"
        )
        raise _error(path, f"is not valid YAML: {reason}", "Restore or export it again.") from error


def _class_names(path: str, content: dict) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        keys = list(names)
        if not all(type(key) is int for key in keys) or sorted(keys) != list(range(len(keys))):
            raise _error(
                path, f"numbers its 'names' {shown(keys)}, not from 0 without gaps", "Correct the numbers."
            )
        names = [names[index] for index in range(len(keys))]
    if not isinstance(names, list) or not 0 < len(names) <= _MAX_CLASSES:
        raise _error(path, "has no list 'names' of its classes", "Add the name of each class.")
    names = [str(name) if type(name) in (int, float) else name for name in names]
    for index, name in enumerate(names):
        if not is_class_name(name):
            raise _error(
                path, f"has {shown(name)} as the name of class {index}, not a printable text", "Correct it."
            )
        if name in names[:index]:
            raise _error(
                path,
                f"has the name {shown(name)} for the classes {names.index(name)} and {index}",
                "Give each class a name of its own.",
            )
    count = content.get("nc", len(names))
    if count != len(names):
        raise _error(
            path, f"says nc = {shown(count)}, but names {len(names)} classes", "Correct one of them."
        )
    return tuple(names)


def _inside(path: str, root: str, base: str, place: str, *, split: str, allow_links: bool) -> str:
    """Returns the path of a split's images, which must be in the folder of `data.yaml`."""
    real_root = os.path.realpath(root)

    def is_inside(candidate: str) -> bool:
        plain = os.path.normpath(candidate)
        real = plain if allow_links else os.path.realpath(candidate)
        within = root if allow_links else real_root
        return real == within or real.startswith(within + os.sep)

    # Exporters write the folder of their own machine into `path`; then only the folder of the file can be meant.
    bases = [os.path.join(root, base), root] if base and not os.path.isabs(base) else [root]
    trimmed = place
    while trimmed.startswith("../"):
        trimmed = trimmed.removeprefix("../")
    candidates = [os.path.normpath(os.path.join(one, name)) for name in (place, trimmed) for one in bases]
    inside = [candidate for candidate in candidates if is_inside(candidate)]
    for candidate in inside:
        if os.path.exists(candidate):
            return candidate
    if trimmed == place and inside:
        raise _error(
            path, f"has the '{split}' path {shown(place)}, which does not exist", "Correct the path."
        )
    raise _error(
        path,
        f"has the '{split}' path {shown(place)}, which leads out of the folder {root}",
        "Put the images inside the folder, and write the path relative to it.",
    )


def _error(path: str, what: str, remedy: str) -> DataError:
    return DataError(
        Fault(kind="unreadable annotations", file=path, what=what, remedy=remedy, severity="fatal")
    )
