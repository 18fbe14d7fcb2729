"""Reads detection data sets in COCO's JSON format: boxes, not masks.

The layout is that of COCO itself:

    root/annotations/instances_{split}.json
    root/{split}/<file_name of each image>

The whole annotation file is checked before anything is trained on it; each fault is reported as one sentence
with the file, the record and the remedy, and the number of further faults of its kind.
"""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.image import check_image, decode_image
from klbox_jax.data.source import DataError, Record


def _is_image_id(value: Any) -> bool:
    # A batch carries its image ids as 32-bit integers.
    return type(value) is int and -(2**31) <= value < 2**31


def _is_id(value: Any) -> bool:
    # The evaluator keeps ids in float64. COCO's own crowd annotations exceed 32 bits.
    return type(value) is int and abs(value) < 2**53


def _is_finite(value: Any) -> bool:
    # Python's JSON reader lets NaN, Infinity and integers beyond any float through.
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_IMAGE_ID = (_is_image_id, "a 32-bit integer")
_ID = (_is_id, "an integer")
_SIZE = (_is_size, "a positive integer")
_TEXT = (_is_text, "a text")
_BOX = (
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value)),
    "four finite numbers (x, y, width, height)",
)
# What each entry must hold. `area` and `iscrowd` may be absent, as many exporters leave them out.
_FIELDS = {
    "images": {"id": _IMAGE_ID, "file_name": _TEXT, "height": _SIZE, "width": _SIZE},
    "annotations": {"id": _ID, "image_id": _IMAGE_ID, "category_id": _ID, "bbox": _BOX},
    "categories": {"id": _ID, "name": _TEXT},
}
_OPTIONAL_FIELDS = {
    "area": (lambda value: _is_finite(value) and value >= 0, "a finite number"),
    "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
}


class CocoSource:
    """A folder in COCO's layout, as `klbox_jax.data.source.Source`.

    Classes are numbered densely in the order of their category ids. Images without objects are kept. Boxes
    are clipped to the image.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        annotation_file: str | os.PathLike | None = None,
        image_dir: str | os.PathLike | None = None,
        check_images: bool = True,
    ):
        """Reads and checks the annotations, and the header and end of every image file.

        Args:
            root: the data set's folder.
            split: e.g. `train2017`.
            annotation_file: relative to `root`; by default `annotations/instances_{split}.json`.
            image_dir: relative to `root`; by default `{split}`.
            check_images: look at every image file now (0.1 ms each), not only when it is read.

        Raises:
            DataError: the folder, its annotations or its images are unusable.
        """
        self.name = f"{os.path.basename(os.path.abspath(root))}/{split}"
        self._file = os.path.join(root, annotation_file or f"annotations/instances_{split}.json")
        self._image_dir = os.path.join(root, image_dir or split)
        for folder in (os.fspath(root), self._image_dir):
            if not os.path.isdir(folder):
                raise DataError(f"{folder} is not a folder. Check the path of the data set and the split.")
        content = _read_json(self._file)
        for section, fields in _FIELDS.items():
            self._check_entries(content, section, fields)
        self._images: list[dict] = content["images"]
        self._annotations: list[dict] = content["annotations"]
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = tuple(category["id"] for category in categories)
        self.class_names = tuple(category["name"] for category in categories)
        self._check_references()
        boxes = self._boxes()
        self._paths = self._image_paths()
        self.records = self._make_records(boxes)
        if check_images:
            self._check_image_files()

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        record = self.records[index]
        return decode_image(self._paths[index], height=record.height, width=record.width)

    def coco_ground_truth(self) -> dict:
        """Returns a new COCO dictionary, complete for pycocotools, with the file's own boxes and ids.

        Where an annotation has the id 0, all are numbered anew from 1: pycocotools takes a match with id 0
        for no match.
        """
        renumber = any(entry["id"] == 0 for entry in self._annotations)
        annotations = [
            {
                "id": number if renumber else entry["id"],
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": list(entry["bbox"]),
                "area": entry.get("area", entry["bbox"][2] * entry["bbox"][3]),
                "iscrowd": int(entry.get("iscrowd", 0)),
            }
            for number, entry in enumerate(self._annotations, start=1)
        ]
        return {
            "info": {"description": self.name},
            "images": [
                {key: entry[key] for key in ("id", "file_name", "height", "width")} for entry in self._images
            ],
            "annotations": annotations,
            "categories": [
                {"id": category, "name": name}
                for category, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }

    def _fail(self, faults: list[str], remedy: str) -> None:
        """Raises for the first of the faults, which are all of one kind."""
        if faults:
            more = f" (and {len(faults) - 1} more of this kind)" if len(faults) > 1 else ""
            raise DataError(f"{self._file}: {faults[0]}{more}. {remedy}")

    def _check_entries(self, content: dict, section: str, fields: dict) -> None:
        """Checks that a section is a list of entries with all their fields and with ids of their own."""
        entries = content.get(section)
        if not isinstance(entries, list):
            self._fail([f"there is no list '{section}'"], "Is this a COCO instances file? Export it again.")
        if not entries and section != "annotations":
            self._fail([f"the list '{section}' is empty"], "Export the annotations again, with all sections.")
        self._fail(
            [
                f"{section}[{i}] is not an object"
                for i, entry in enumerate(entries)
                if not isinstance(entry, dict)
            ],
            "Correct or remove the entry.",
        )
        self._fail(
            [
                f"{_label(section, i, entry)} has no '{key}'"
                for i, entry in enumerate(entries)
                for key in fields
                if key not in entry
            ],
            "Add what is missing, or remove the entry.",
        )
        optional = _OPTIONAL_FIELDS if section == "annotations" else {}
        self._fail(
            [
                f"'{key}' of {_label(section, i, entry)} is {_shown(entry[key])}, not {expected}"
                for i, entry in enumerate(entries)
                for key, (accepts, expected) in {**fields, **optional}.items()
                if key in entry and not accepts(entry[key])
            ],
            "Correct or remove the entry.",
        )
        first_with: dict[int, int] = {}
        self._fail(
            [
                f"{section}[{first_with[entry['id']]}] and {section}[{i}] have the same id {entry['id']}"
                for i, entry in enumerate(entries)
                if first_with.setdefault(entry["id"], i) != i
            ],
            "Give each entry an id of its own.",
        )

    def _check_references(self) -> None:
        for key, known, section in (
            ("image_id", {entry["id"] for entry in self._images}, "images"),
            ("category_id", set(self.category_ids), "categories"),
        ):
            self._fail(
                [
                    f"annotation {entry['id']} has {key} {entry[key]}, which '{section}' does not list"
                    for entry in self._annotations
                    if entry[key] not in known
                ],
                "Add the missing entry, or remove the annotation.",
            )

    def _boxes(self) -> np.ndarray:
        """Returns each annotation's clipped `x1, y1, x2, y2`, float32 [annotations, 4]."""
        sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in self._images}
        xywh = np.array([entry["bbox"] for entry in self._annotations], np.float64).reshape(-1, 4)
        limits = np.array([sizes[entry["image_id"]] for entry in self._annotations], np.float64).reshape(
            -1, 2
        )
        for fault, is_fault in (
            ("no positive width and height", (xywh[:, 2:] <= 0).any(axis=1)),
            (
                "no part inside its image",
                (xywh[:, :2] >= limits).any(axis=1) | (xywh[:, :2] + xywh[:, 2:] <= 0).any(axis=1),
            ),
        ):
            self._fail(
                [
                    f"annotation {self._annotations[i]['id']} has a box with {fault}: "
                    f"{self._annotations[i]['bbox']} in image {self._annotations[i]['image_id']}"
                    for i in np.flatnonzero(is_fault)
                ],
                "Correct or remove the annotation.",
            )
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        boxes = np.clip(corners, 0, np.tile(limits, 2)).astype(np.float32)
        self._fail(
            [
                f"annotation {self._annotations[i]['id']} has a box too small to be told from a line: "
                f"{self._annotations[i]['bbox']}"
                for i in np.flatnonzero((boxes[:, 2:] <= boxes[:, :2]).any(axis=1))
            ],
            "Correct or remove the annotation.",
        )
        return boxes

    def _image_paths(self) -> list[str]:
        folder = os.path.realpath(self._image_dir)
        paths, faults = [], []
        for entry in self._images:
            path = os.path.join(self._image_dir, entry["file_name"])
            try:
                inside = os.path.realpath(path).startswith(folder + os.sep)
            except (OSError, ValueError):  # No file system takes such a name.
                inside = False
            if not inside or os.path.isabs(entry["file_name"]) or ".." in entry["file_name"].split("/"):
                faults.append(
                    f"file_name {_shown(entry['file_name'])} of image {entry['id']} does not stay in the "
                    f"image folder {self._image_dir}"
                )
            paths.append(path)
        self._fail(faults, "Name files relative to the image folder, and keep them (not links) inside it.")
        return paths

    def _make_records(self, boxes: np.ndarray) -> tuple[Record, ...]:
        dense = {category: index for index, category in enumerate(self.category_ids)}
        classes = np.array([dense[entry["category_id"]] for entry in self._annotations], np.int32)
        is_crowd = np.array([entry.get("iscrowd", 0) for entry in self._annotations], bool)
        rows_of: dict[int, list[int]] = {entry["id"]: [] for entry in self._images}
        for row, entry in enumerate(self._annotations):
            rows_of[entry["image_id"]].append(row)
        records = []
        for entry, path in zip(self._images, self._paths, strict=True):
            rows = np.array(rows_of[entry["id"]], np.intp)
            records.append(
                Record(
                    image_id=entry["id"],
                    file_name=path,
                    height=entry["height"],
                    width=entry["width"],
                    boxes=boxes[rows],
                    classes=classes[rows],
                    is_crowd=is_crowd[rows],
                )
            )
        return tuple(records)

    def _check_image_files(self) -> None:
        faults = []
        for record, path in zip(self.records, self._paths, strict=True):
            try:
                check_image(path, height=record.height, width=record.width)
            except DataError as error:
                faults.append(f"image {record.image_id} is unusable: {error}")
        if faults:
            more = f" ({len(faults) - 1} more images are unusable.)" if len(faults) > 1 else ""
            raise DataError(f"{self._file}: {faults[0]}{more}")


def _label(section: str, index: int, entry: dict) -> str:
    return f"{section}[{index}]" + (f" (id {_shown(entry['id'])})" if "id" in entry else "")


def _shown(value: Any) -> str:
    """A value for a message, cut short: a file may hold anything."""
    text = ascii(value) if not isinstance(value, (list, dict)) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}). Check the data set's path and the split."
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path} is not valid JSON: {reason}. Restore or export it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object. Is this a COCO instances file? Export it again.")
    return content
