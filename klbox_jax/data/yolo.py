"""Reader of detection data sets in YOLO's format: `data.yaml`, images, and a text file of labels for each image.

A line of a label file is `class x y width height`, the centre and the size as fractions of the image, or
`class x1 y1 x2 y2 x3 y3 ...`, a polygon, whose extent is the box. The labels of `images/train/a.jpg` are in
`labels/train/a.txt`; without a folder `images` in its path, the label file is next to the image. An image without a
label file has no objects.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from klbox_jax.data.image import decode_image, upright_size
from klbox_jax.data.image_files import (
    SUFFIXES,
    ImageRules,
    find_image_fault,
    leads_outside,
    link_fault,
    real_folders,
)
from klbox_jax.data.masks import parse_segmentation
from klbox_jax.data.source import DataError, Fault, FaultHandler, Record, coco_dictionary, raise_fault, shown
from klbox_jax.data.text_files import read_text
from klbox_jax.data.yolo_config import YoloConfig, find_yolo_config, read_yolo_config

# Enough for ten thousand polygons, or the paths of a million images.
_MAX_LABEL_BYTES = 2**24
_MAX_LIST_BYTES = 2**26
_CORRECT = "Correct or remove the line."
# Coordinates are written with about six digits.
_ROUNDING = 1e-5


class YoloSource:
    """A split of a YOLO data set, as `klbox_jax.data.source.Source`.

    Images are numbered from 1 in the order of their paths. Category ids are the class numbers of the label files.
    Boxes are clipped to the image.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]
    fingerprint: str | None = None

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        masks: bool = False,
        skip_empty_boxes: bool = False,
        images: ImageRules = ImageRules(),  # noqa: B008
        on_fault: FaultHandler = raise_fault,
    ):
        """Reads and checks every label file, and the header and end of every image file.

        Args:
            root: the folder of `data.yaml`.
            split: train, val or test.
            masks: read the masks too; every object must be a polygon.
            skip_empty_boxes: leave out boxes of no width or height, with a warning, instead of refusing them.
            images: rules for the image files.
            on_fault: receives the faults of single images and lines; these images are left out.

        Raises:
            DataError: `data.yaml` is missing or unusable, the split has no images, or (from `on_fault`) an image.
        """
        path = find_yolo_config(root)
        if path is None:
            raise DataError(
                f"{os.fspath(root)} has no data.yaml. Point config.data.root to the folder that has it."
            )
        config = read_yolo_config(path, allow_links=images.allow_links)
        if split not in config.splits:
            raise DataError(f"{path} has no split {shown(split)}; it has {', '.join(config.splits)}.")
        self.name = f"{os.path.basename(os.path.abspath(root))}/{split}"
        self.class_names = config.class_names
        self.category_ids = tuple(range(len(config.class_names)))
        reader = _LabelReader(len(config.class_names), path, masks, skip_empty_boxes)
        folders = real_folders(os.fspath(root))
        records, faults = [], []
        for image_id, image in enumerate(_image_paths(config, split), start=1):
            try:
                if leads_outside(image, folders, images):
                    raise DataError(link_fault(image))
                height, width = upright_size(image)
                fault = find_image_fault(image, height=height, width=width, rules=images)
                if fault is not None:
                    raise DataError(fault)
                labels = label_path(image, os.path.dirname(os.path.abspath(path)))
                if leads_outside(labels, folders, images):
                    raise DataError(link_fault(labels))
                record, found = reader.read_record(labels, image, image_id, (height, width))
                faults += found
                if not any(fault.is_serious for fault in found):
                    records.append(record)
            except DataError as error:
                faults.append(error.fault)
        on_fault(faults)
        self.records = tuple(records)

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        record = self.records[index]
        return decode_image(record.file_name, height=record.height, width=record.width)

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary of the records."""
        return coco_dictionary(self)


def label_path(image: str, root: str) -> str:
    """Returns the label file of an image: in its path below the root the last `images` is `labels`, the suffix txt."""
    stem = os.sep + os.path.splitext(os.path.relpath(image, root))[0]
    before, found, after = stem.rpartition(f"{os.sep}images{os.sep}")
    if found:
        stem = f"{before}{os.sep}labels{os.sep}{after}"
    return f"{root}{stem}.txt"


def _image_paths(config: YoloConfig, split: str) -> list[str]:
    paths: list[str] = []
    for place in config.splits[split]:
        if os.path.isdir(place):
            paths += sorted(_images_below(place))
        elif place.lower().endswith(".txt"):
            paths += _listed_images(place, os.path.dirname(os.path.abspath(config.path)))
        else:
            paths.append(place)
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise DataError(
            f"{config.path} has no images in its '{split}' path. Restore them, or correct the path."
        )
    return paths


def _images_below(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(parent, name)


def _listed_images(path: str, root: str) -> list[str]:
    """Returns the images of a list, whose paths are relative to it (`./`) or to the data set's folder."""
    lines = [line.strip() for line in read_text(path, _MAX_LIST_BYTES, severity="fatal").split("\n")]
    found = []
    for line in filter(None, lines):
        base = os.path.dirname(path) if line.startswith("./") else root
        image = os.path.normpath(os.path.join(base, line))
        if "\0" in line or not image.startswith(root + os.sep):
            fault = Fault(
                kind="path out of the image folder",
                file=path,
                record=f"the line {shown(line)}",
                what=f"leads out of the folder {root}",
                remedy="Put the images inside the folder, and write their paths relative to it.",
                severity="fatal",
            )
            raise DataError(fault)
        found.append(image)
    return found


class _LabelReader(NamedTuple):
    """Reads label files.

    Attributes:
        num_classes: number of classes.
        config_path: the file that names them, for messages.
        masks: read polygons as masks.
        skip_empty_boxes: leave out boxes of no width or height.
    """

    num_classes: int
    config_path: str
    masks: bool
    skip_empty_boxes: bool

    def read_record(
        self, path: str, image: str, image_id: int, size: tuple[int, int]
    ) -> tuple[Record, list[Fault]]:
        """Returns the annotation of an image of `(height, width)` pixels, and the faults of single lines."""
        height, width = size
        lines = read_text(path, _MAX_LABEL_BYTES).split("\n") if os.path.lexists(path) else []
        boxes, classes, segmentations, faults = [], [], [], []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                index, points, is_polygon = self._parse(path, number, line)
                box = self._box(path, number, points, size)
                if self.masks:
                    segmentations.append(_polygon(path, number, points, size, is_polygon=is_polygon))
                boxes.append(box)
                classes.append(index)
            except DataError as error:
                faults.append(error.fault)
        record = Record(
            image_id=image_id,
            file_name=image,
            height=height,
            width=width,
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            classes=np.array(classes, np.int32),
            is_crowd=np.zeros(len(boxes), bool),
            segmentations=tuple(segmentations) if self.masks else None,
        )
        return record, faults

    def _parse(self, path: str, number: int, line: str) -> tuple[int, Float[ndarray, "n 2"], bool]:
        """Returns the class of a line, the corners of its box or polygon as fractions, and True for a polygon."""
        words = line.split()
        is_box = len(words) == 5
        if not is_box and (len(words) < 7 or len(words) % 2 == 0):
            what = f"has {len(words)} numbers, neither class x y width height nor a polygon of three or more points"
            raise _error(path, number, "wrong label", what)
        try:
            index = int(words[0]) if words[0].isdecimal() else int(_whole(words[0]))
            values = [float(word) for word in words[1:]]
        except ValueError:
            raise _error(path, number, "wrong label", f"is {shown(line.strip())}, not numbers") from None
        if not 0 <= index < self.num_classes:
            last = self.num_classes - 1
            what = f"has class {index}, but {self.config_path} names {self.num_classes} classes, 0 to {last}"
            raise _error(path, number, "unknown category_id", what)
        wrong = [value for value in values if not -_ROUNDING <= value <= 1 + _ROUNDING]
        if wrong:
            what = f"has the coordinate {wrong[0]:g}, which is not a fraction of the image from 0 to 1"
            raise _error(path, number, "coordinate out of range", what)
        if is_box:
            x, y, w, h = values
            corners = [[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]]
            return index, np.array(corners, np.float64), False
        return index, np.array(values, np.float64).reshape(-1, 2), True

    def _box(
        self, path: str, number: int, points: Float[ndarray, "n 2"], size: tuple[int, int]
    ) -> Float[ndarray, "4"]:
        height, width = size
        corners = np.concatenate([points.min(axis=0), points.max(axis=0)]) * np.array([width, height] * 2)
        box = np.clip(corners, 0, [width, height] * 2).astype(np.float32)
        if (box[2:] > box[:2]).all():
            return box
        if self.skip_empty_boxes:
            kept = "It is left out; correct it, if there are many."
            raise _error(
                path, number, "empty box", "has a box without width or height", kept, severity="warning"
            )
        skip = "Correct or remove the line, or set config.data.skip_empty_boxes = True to train without it."
        raise _error(path, number, "empty box", "has a box without width or height", skip)


def _whole(word: str) -> float:
    value = float(word)
    if not math.isfinite(value) or value % 1:
        raise ValueError(word)
    return value


def _polygon(
    path: str, number: int, points: Float[ndarray, "n 2"], size: tuple[int, int], *, is_polygon: bool
) -> tuple[Float[ndarray, "_ 2"], ...]:
    height, width = size
    try:
        if not is_polygon:
            raise ValueError("nothing")
        scaled = (points * np.array([width, height])).ravel().tolist()
        return parse_segmentation([scaled], height=height, width=width)
    except ValueError as error:
        remedy = "Correct or remove the line, or set config.data.mask_size to 0 to train without masks."
        raise _error(path, number, "malformed mask", f"has a malformed mask: {error}", remedy) from error


def _error(
    path: str, number: int, kind: str, what: str, remedy: str = _CORRECT, *, severity: str = "error"
) -> DataError:
    fault = Fault(kind=kind, file=path, record=f"line {number}", what=what, remedy=remedy, severity=severity)
    return DataError(fault)
