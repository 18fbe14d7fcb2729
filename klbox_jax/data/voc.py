"""Reads detection data sets in PASCAL VOC's XML format.

The layout is that of the VOC devkit:

    root/VOC{year}/ImageSets/Main/{split}.txt    the name of an image on each line
    root/VOC{year}/Annotations/{name}.xml
    root/VOC{year}/JPEGImages/{name}.jpg

VOC's boxes name their first and last pixel, counted from 1. In continuous edges, where pixel `i` (from 0) covers
`[i, i + 1)`, the box `xmin, ymin, xmax, ymax` is `xmin - 1, ymin - 1, xmax, ymax`. Objects that VOC marks as
difficult are ignored: in training as a crowd is (not as background), in the evaluation as
`klbox_jax.evaluation.voc` says.
"""

import math
import os
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.image import check_image, decode_image
from klbox_jax.data.source import DataError, Record, coco_dictionary, shown

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_MAX_XML_BYTES = 2**24


def parse_voc_split(split: str) -> tuple[tuple[str, str], ...]:
    """Returns the (year, split) pairs of a text such as `2007_trainval+2012_trainval`; raises ValueError."""
    pairs = [part.partition("_") for part in split.split("+")]
    if not all(re.fullmatch(r"\w+", year) and re.fullmatch(r"[\w-]+", name) for year, _, name in pairs):
        raise ValueError(
            f"The split {split!r} is not of the form 2007_trainval or 2007_trainval+2012_trainval."
        )
    return tuple((year, name) for year, _, name in pairs)


class VocSource:
    """Splits of a folder in VOC's layout, as `klbox_jax.data.source.Source`.

    Images are numbered from 1 in the order of the splits, categories from 1 in the order of the classes. Boxes
    are clipped to the image. A record's `is_crowd` marks the difficult objects.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]

    def __init__(
        self,
        root: str | os.PathLike,
        splits: Sequence[tuple[str, str]],
        *,
        class_names: tuple[str, ...] = VOC_CLASSES,
        check_images: bool = True,
    ):
        """Reads and checks every annotation, and the header and end of every image file.

        Args:
            root: the folder that holds VOC2007, VOC2012 and so on.
            splits: (year, split) pairs, e.g. `("2007", "trainval"), ("2012", "trainval")`.
            class_names: every class that the annotations may name.
            check_images: look at every image file now, not only when it is read.

        Raises:
            DataError: the folder, its annotations or its images are unusable.
        """
        joined = "+".join(f"{year}_{split}" for year, split in splits)
        self.name = f"{os.path.basename(os.path.abspath(root))}/{joined}"
        self.class_names = tuple(class_names)
        self.category_ids = tuple(range(1, len(class_names) + 1))
        records, faults, seen = [], [], set()
        for year, split in splits:
            folder = os.path.join(root, f"VOC{year}")
            for name in _read_image_names(folder, split):
                path = os.path.join(folder, "JPEGImages", f"{name}.jpg")
                try:
                    if path in seen:
                        raise DataError(f"{path} is listed twice in {joined}. Remove one of its lines.")
                    seen.add(path)
                    annotation_file = os.path.join(folder, "Annotations", f"{name}.xml")
                    record = _read_record(annotation_file, path, len(records) + 1, self.class_names)
                    if check_images:
                        check_image(path, height=record.height, width=record.width)
                    records.append(record)
                except DataError as error:
                    faults.append(str(error))
        if faults:
            more = f" ({len(faults) - 1} more images are unusable.)" if len(faults) > 1 else ""
            raise DataError(faults[0] + more)
        self.records = tuple(records)

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        record = self.records[index]
        return decode_image(record.file_name, height=record.height, width=record.width)

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary of the records, each annotation with VOC's `difficult` beside `iscrowd`.

        COCO's protocol has no other way to ignore an object than as a crowd.
        """
        content = coco_dictionary(self)
        for annotation in content["annotations"]:
            annotation["difficult"] = annotation["iscrowd"]
        return content


def _read_image_names(folder: str, split: str) -> list[str]:
    path = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is not a folder. Point config.data.root to the folder that holds VOC2007 or VOC2012."
        )
    names = _read_text(path).split("\n")
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise DataError(
                f"{path} has the line {shown(name)}, which is not the name of an image. Use a list of names, "
                "without folders or a second column."
            )
    if not names:
        raise DataError(f"{path} lists no images. Restore the file, or choose another split.")
    return names


def _read_text(path: str) -> str:
    try:
        if os.path.getsize(path) > _MAX_XML_BYTES:
            raise DataError(f"{path} is absurdly large. Restore the file.")
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}). Check the data set's path and split."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it.") from error


def _read_xml(path: str) -> ElementTree.Element:
    text = _read_text(path)
    # Entities that expand without end, or that read other files, can only be declared behind this word.
    if "<!DOCTYPE" in text:
        raise DataError(f"{path} has a DOCTYPE, which annotations do not need. Remove it.")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} is not valid XML: {error}. Restore or export it again.") from error


def _read_record(path: str, image_path: str, image_id: int, class_names: tuple[str, ...]) -> Record:
    root = _read_xml(path)
    width, height = (_number(path, root, f"size/{key}") for key in ("width", "height"))
    if not (1 <= width < 2**31 and 1 <= height < 2**31) or width % 1 or height % 1:
        raise DataError(f"{path} says its image is {width:g} wide and {height:g} high. Correct 'size'.")
    limits = [width, height, width, height]
    boxes, classes, is_difficult = [], [], []
    for number, entry in enumerate(root.findall("object"), start=1):
        label = f"object {number}"
        name = (entry.findtext("name") or "").strip()
        if name not in class_names:
            raise DataError(
                f"{path}: {label} is of the unknown class {shown(name)}. Correct it, or name the classes of your "
                "own data in config.data.class_names."
            )
        edges = [_number(path, entry, f"bndbox/{key}", label) for key in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = edges[0] - 1, edges[1] - 1, edges[2], edges[3]
        shown_box = f"{label} has a box xmin, ymin, xmax, ymax = {edges}"
        if x1 >= x2 or y1 >= y2:
            raise DataError(f"{path}: {shown_box} without width or height. Correct or remove the object.")
        if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
            raise DataError(
                f"{path}: {shown_box} with no part inside the image of {width:g} x {height:g} pixels (width x "
                "height). Correct or remove the object."
            )
        boxes.append(np.clip([x1, y1, x2, y2], 0, limits))
        classes.append(class_names.index(name))
        is_difficult.append(_flag(path, entry, "difficult", label))
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Record(
        image_id=image_id,
        file_name=image_path,
        height=int(height),
        width=int(width),
        boxes=boxes,
        classes=np.array(classes, np.int32),
        is_crowd=np.array(is_difficult, bool),
    )


def _number(path: str, element: ElementTree.Element, key: str, label: str = "the file") -> float:
    text = element.findtext(key)
    try:
        value = float(text if text is not None else "")
    except ValueError:
        value = math.nan
    if not abs(value) < 1e30:  # also where it is NaN
        found = "has no" if text is None else f"has {shown(text.strip())} as its"
        raise DataError(f"{path}: {label} {found} '{key}', which must be a number. Correct the file.")
    return value


def _flag(path: str, element: ElementTree.Element, key: str, label: str) -> bool:
    text = (element.findtext(key) or "0").strip()
    if text not in ("0", "1"):
        raise DataError(f"{path}: {label} has {shown(text)} as its '{key}', not 0 or 1. Correct the file.")
    return text == "1"
