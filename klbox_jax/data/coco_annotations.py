"""Reads an annotation file in COCO's JSON format, and checks all of it.

Each fault is reported as one sentence with the file, the record and the remedy, and the number of further
faults of its kind.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float
from numpy import ndarray

from klbox_jax.data.masks import Segmentation, parse_segmentation
from klbox_jax.data.source import DataError, refuse, shown


@dataclasses.dataclass(frozen=True)
class CocoAnnotations:
    """A checked annotation file.

    Attributes:
        images, annotations: the file's entries, in its order. The annotations are without their masks.
        categories: the file's entries, in the order of their ids.
        boxes: `x1, y1, x2, y2` of each annotation, clipped to its image.
        has_extent: False for an annotation whose box has no width or no height.
        segmentations: the mask of each annotation, or None where masks were not asked for.
    """

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    boxes: Float[ndarray, "n 4"]
    has_extent: Bool[ndarray, " n"]
    segmentations: list[Segmentation] | None


def read_coco_annotations(path: str, *, masks: bool, skip_empty_boxes: bool) -> CocoAnnotations:
    """Returns a checked annotation file.

    Args:
        path: the JSON file.
        masks: check and keep the segmentations.
        skip_empty_boxes: mark and warn of boxes of no width or no height instead of refusing them. COCO's own
            train2017 has two of them, of height 0.

    Raises:
        DataError: the file or an entry of it is unusable.
    """
    content = _read_json(path)
    for section, fields in _FIELDS.items():
        _check_entries(path, content, section, fields)
    images, annotations = content["images"], content["annotations"]
    _check_names(path, content["categories"])
    _check_references(path, content)
    boxes, has_extent = _boxes(path, images, annotations, skip_empty=skip_empty_boxes)
    segmentations = _segmentations(path, images, annotations) if masks else None
    for entry in annotations:  # They are most of the file, and those that are wanted lie smaller elsewhere.
        entry.pop("segmentation", None)
    return CocoAnnotations(
        images=images,
        annotations=annotations,
        categories=sorted(content["categories"], key=lambda category: category["id"]),
        boxes=boxes,
        has_extent=has_extent,
        segmentations=segmentations,
    )


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


def _label(section: str, index: int, entry: dict) -> str:
    return f"{section}[{index}]" + (f" (id {shown(entry['id'])})" if "id" in entry else "")


def _check_entries(path: str, content: dict, section: str, fields: dict) -> None:
    """Checks that a section is a list of entries with all their fields and with ids of their own."""
    entries = content.get(section)
    if not isinstance(entries, list):
        refuse(path, [f"there is no list '{section}'"], "Is this a COCO instances file? Export it again.")
    if not entries and section != "annotations":
        refuse(path, [f"the list '{section}' is empty"], "Export the annotations again, with all sections.")
    refuse(
        path,
        [
            f"{section}[{i}] is not an object"
            for i, entry in enumerate(entries)
            if not isinstance(entry, dict)
        ],
        "Correct or remove the entry.",
    )
    refuse(
        path,
        [
            f"{_label(section, i, entry)} has no '{key}'"
            for i, entry in enumerate(entries)
            for key in fields
            if key not in entry
        ],
        "Add what is missing, or remove the entry.",
    )
    optional = _OPTIONAL_FIELDS if section == "annotations" else {}
    refuse(
        path,
        [
            f"'{key}' of {_label(section, i, entry)} is {shown(entry[key])}, not {expected}"
            for i, entry in enumerate(entries)
            for key, (accepts, expected) in {**fields, **optional}.items()
            if key in entry and not accepts(entry[key])
        ],
        "Correct or remove the entry.",
    )
    first_with: dict[int, int] = {}
    refuse(
        path,
        [
            f"{section}[{first_with[entry['id']]}] and {section}[{i}] have the same id {entry['id']}"
            for i, entry in enumerate(entries)
            if first_with.setdefault(entry["id"], i) != i
        ],
        "Give each entry an id of its own.",
    )


def _check_names(path: str, categories: list[dict]) -> None:
    first_with: dict[str, int] = {}
    refuse(
        path,
        [
            f"the categories {first_with[entry['name']]} and {entry['id']} have the same name "
            f"{shown(entry['name'])}"
            for entry in categories
            if first_with.setdefault(entry["name"], entry["id"]) != entry["id"]
        ],
        "Give each category a name of its own, or merge the two.",
    )


def _check_references(path: str, content: dict) -> None:
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[section]}
        refuse(
            path,
            [
                f"annotation {entry['id']} has {key} {entry[key]}, which '{section}' does not list"
                for entry in content["annotations"]
                if entry[key] not in known
            ],
            "Add the missing entry, or remove the annotation.",
        )


def _boxes(
    path: str, images: list[dict], annotations: list[dict], *, skip_empty: bool
) -> tuple[Float[ndarray, "n 4"], Bool[ndarray, " n"]]:
    """Returns each annotation's clipped `x1, y1, x2, y2`, float32, and whether it has width and height."""
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in images}
    xywh = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    limits = np.array([sizes[entry["image_id"]] for entry in annotations], np.float64).reshape(-1, 2)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(corners, 0, np.tile(limits, 2)).astype(np.float32)
    has_extent = (xywh[:, 2:] > 0).all(axis=1)

    def described(i: int, fault: str) -> str:
        entry = annotations[i]
        return (
            f"annotation {entry['id']} has a box {fault}: {shown(entry['bbox'])} in image {entry['image_id']}"
        )

    if not skip_empty:
        refuse(
            path,
            [
                described(i, "with no positive width and height")
                for i in np.flatnonzero((xywh[:, 2:] == 0).any(axis=1)).tolist()
            ],
            "Correct or remove the annotation, or set config.data.skip_empty_boxes = True to train without it.",
        )
    for fault, is_fault in (
        ("with a negative width or height", (xywh[:, 2:] < 0).any(axis=1)),
        (
            "with no part inside its image",
            has_extent & ((corners[:, :2] >= limits) | (corners[:, 2:] <= 0)).any(axis=1),
        ),
        ("too small to be told from a line", has_extent & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)),
    ):
        refuse(
            path,
            [described(i, fault) for i in np.flatnonzero(is_fault).tolist()],
            "Correct or remove the annotation.",
        )
    flat = np.flatnonzero(~has_extent).tolist()
    if flat:
        logging.warning(
            "%s: %s. %d such annotations are left out of training; the evaluation keeps them.",
            path,
            described(flat[0], "without width or height"),
            len(flat),
        )
    return boxes, has_extent


def _segmentations(path: str, images: list[dict], annotations: list[dict]) -> list[Segmentation]:
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
    segmentations, faults = [], []
    for entry in annotations:
        height, width = sizes[entry["image_id"]]
        try:
            segmentation = parse_segmentation(entry.get("segmentation"), height=height, width=width)
            if isinstance(segmentation, ndarray) and not segmentation[1::2].any():
                raise ValueError("run lengths without a pixel of the object")
            segmentations.append(segmentation)
        except ValueError as error:
            faults.append(f"annotation {entry['id']} in image {entry['image_id']} has as its mask {error}")
    refuse(
        path,
        faults,
        "Correct or remove the annotation, or set config.data.mask_size to 0 to train without masks.",
    )
    return segmentations
