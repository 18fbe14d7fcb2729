"""Detection of the layout of a data set's folder: COCO, Roboflow's COCO, VOC or YOLO."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from klbox_jax.data.coco import CocoFiles
from klbox_jax.data.source import DataError, shown
from klbox_jax.data.voc_files import find_voc_splits
from klbox_jax.data.yolo_config import find_yolo_config, read_yolo_config

_LOOKED_FOR = (
    "annotations/instances_*.json or annotations/*.json (COCO), */_annotations.coco.json (Roboflow's COCO), "
    "VOC*/ImageSets/Main/*.txt, ImageSets/Main/*.txt or */*.xml next to images (VOC), and data.yaml (YOLO)"
)
# Annotation files of other tasks, which COCO keeps in the same folder.
_OTHER_TASKS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
# Names of one kind of split, after years are removed.
_KINDS = (
    ("train", "training", "trainval"),
    ("val", "valid", "validation", "dev", "eval"),
    ("test", "testing"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a folder.

    Attributes:
        name: the reader, a value of `config.data.name`: coco, voc or yolo.
        description: the layout in words, for messages.
        splits: the splits in the order of their names, with the files of those of COCO.
    """

    name: str
    description: str
    splits: Mapping[str, CocoFiles | None]


def find_layout(root: str | os.PathLike) -> Layout:
    """Returns the layout of a folder.

    Raises:
        DataError: the folder is missing, or has no known layout; the message lists what was looked for and found.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder. Check config.data.root.")
    layout = _known_layout(root)
    if layout is not None:
        return layout
    inside = sorted(os.listdir(root))
    found = ", ".join(shown(name)[1:-1] for name in inside[:8]) + (", ..." if len(inside) > 8 else "")
    deeper = [name for name in inside if os.path.isdir(os.path.join(root, name))][:20]
    deeper = [name for name in deeper if _known_layout(os.path.join(root, name), quick=True) is not None]
    remedy = "Set config.data.annotation_file and config.data.image_dir for COCO files in other places"
    if deeper:
        remedy = f"Set config.data.root to its folder {shown(deeper[0])[1:-1]}, which has one of them"
    raise DataError(
        f"{root} has no known layout. Looked for {_LOOKED_FOR}; found {found or 'nothing'}. {remedy}."
    )


def _known_layout(root: str, *, quick: bool = False) -> Layout | None:
    """Returns the layout of a folder, or None; `quick` does not open files."""
    if splits := find_coco_splits(root):
        is_roboflow = any(
            files.annotation_file.endswith("_annotations.coco.json") for files in splits.values()
        )
        place = "*/_annotations.coco.json" if is_roboflow else "annotations/*.json"
        return Layout(name="coco", description=f"COCO ({place})", splits=splits)
    if names := find_voc_splits(root):
        return Layout(name="voc", description="VOC (XML files)", splits=dict.fromkeys(names))
    if path := find_yolo_config(root):
        names = () if quick else tuple(read_yolo_config(path).splits)
        return Layout(
            name="yolo", description=f"YOLO ({os.path.basename(path)})", splits=dict.fromkeys(names)
        )
    return None


def find_coco_splits(root: str | os.PathLike) -> dict[str, CocoFiles]:
    """Returns the files of each split of a folder in COCO's or Roboflow's layout; empty for other layouts."""
    root = Path(root)
    paths = {
        path.stem.removeprefix("instances_"): path
        for path in sorted(root.glob("annotations/instances_*.json"))
    }
    if not paths:
        others = sorted(root.glob("annotations/*.json"))
        paths = {path.stem: path for path in others if not path.stem.startswith(_OTHER_TASKS)}
    splits = {
        split: CocoFiles(annotation_file=os.fspath(path.relative_to(root)), image_dir=_image_dir(root, split))
        for split, path in paths.items()
    }
    if not splits:
        splits = {
            path.parent.name: CocoFiles(
                annotation_file=os.fspath(path.relative_to(root)), image_dir=path.parent.name
            )
            for path in sorted(root.glob("*/_annotations.coco.json"))
        }
    return splits


def _image_dir(root: Path, split: str) -> str:
    places = (split, f"images/{split}", f"{split}/images", "images", "data")
    return next((place for place in places if (root / place).is_dir()), split)


def resolve_split(split: str, splits: Sequence[str], *, root: str | os.PathLike) -> str:
    """Returns the split of a folder that a config's split means.

    This is the split of that name, or else the only one of its kind: train for train2017, valid for validation; for
    a validation split the test split if there is no other, and the reverse.

    Raises:
        DataError: there is no such split, or there are several.
    """
    parts = split.split("+")
    if split in splits or (len(parts) > 1 and set(parts) <= set(splits)):
        return split
    kind = _kind(split)
    found: list[str] = []
    if kind is not None:
        others = [kind] if kind == 0 else [kind, 3 - kind]
        by_kind = ([name for name in splits if _kind(name) == other] for other in others)
        found = next((names for names in by_kind if names), [])
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{os.fspath(root)} has no split {shown(split)[1:-1]}; it has {', '.join(splits) or 'none'}. Set "
        "config.data.train_split and config.data.eval_split to two of them."
    )


def _kind(split: str) -> int | None:
    """Returns 0 for a training split, 1 for a validation split, 2 for a test split, None for others."""
    name = re.sub(r"^\d{4}_|[_-]?\d{4}$", "", split.lower())
    return next((index for index, names in enumerate(_KINDS) if name in names), None)
