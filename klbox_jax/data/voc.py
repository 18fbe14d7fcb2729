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

from klbox_jax.data.coco_entries import MAX_SIDE
from klbox_jax.data.image import check_image, decode_image, pixel_limit
from klbox_jax.data.source import DataError, Fault, Record, Report, coco_dictionary, refuse, shown

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Room for ten thousand objects, or the names of a million images.
_MAX_XML_BYTES = 2**22
_MAX_LIST_BYTES = 2**24
_CHECK_PATH = "Check the data set's path and split."
_CORRECT = "Correct or remove the object."


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
    fingerprint: str | None = None

    def __init__(
        self,
        root: str | os.PathLike,
        splits: Sequence[tuple[str, str]],
        *,
        class_names: tuple[str, ...] = VOC_CLASSES,
        check_images: bool = True,
        report: Report = refuse,
    ):
        """Reads and checks every annotation, and the header and end of every image file.

        Args:
            root: the folder that holds VOC2007, VOC2012 and so on.
            splits: (year, split) pairs, e.g. `("2007", "trainval"), ("2012", "trainval")`.
            class_names: every class that the annotations may name.
            check_images: look at every image file now, not only when it is read.
            report: takes what is wrong with single images; such images are left out.

        Raises:
            DataError: the folder or its list of images is unusable, or (from `report`) an image.
        """
        joined = "+".join(f"{year}_{split}" for year, split in splits)
        self.name = f"{os.path.basename(os.path.abspath(root))}/{joined}"
        self.class_names = tuple(class_names)
        self.category_ids = tuple(range(1, len(class_names) + 1))
        names = [
            (os.path.join(root, f"VOC{year}"), name)
            for year, split in splits
            for name in _read_image_names(os.path.join(root, f"VOC{year}"), split)
        ]
        records, faults, seen = [], [], set()
        for image_id, (folder, name) in enumerate(names, start=1):
            path = os.path.join(folder, "JPEGImages", f"{name}.jpg")
            try:
                if path in seen:
                    raise _error(
                        path, "duplicate id", f"is listed twice in {joined}", "Remove one of its lines."
                    )
                seen.add(path)
                annotation_file = os.path.join(folder, "Annotations", f"{name}.xml")
                record, found = _read_record(annotation_file, path, image_id, self.class_names)
                faults += found
                if check_images:
                    check_image(path, height=record.height, width=record.width)
                if not found:
                    records.append(record)
            except DataError as error:
                faults.append(error.fault)
        report(faults)
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


def _error(
    path: str, kind: str, what: str, remedy: str, *, record: str = "", severity: str = "error"
) -> DataError:
    fault = Fault(kind=kind, file=path, record=record, what=what, remedy=remedy, severity=severity)
    return DataError(fault)


def _read_image_names(folder: str, split: str) -> list[str]:
    path = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
    kind, severity = "unreadable annotations", "fatal"
    if not os.path.isdir(folder):
        raise _error(
            folder,
            kind,
            "is not a folder",
            "Point config.data.root to the folder that holds VOC2007 or VOC2012.",
            severity=severity,
        )
    names = _read_text(path, _MAX_LIST_BYTES, severity=severity).split("\n")
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise _error(
                path,
                kind,
                f"has the line {shown(name)}, which is not the name of an image",
                "Use a list of names, without folders or a second column.",
                severity=severity,
            )
    if not names:
        raise _error(
            path, kind, "lists no images", "Restore the file, or choose another split.", severity=severity
        )
    return names


def _read_text(path: str, max_bytes: int, *, severity: str = "error") -> str:
    kind = "unreadable annotations"
    try:
        size = os.path.getsize(path)
        # `isfile` also keeps a pipe from blocking the reader for ever.
        if not os.path.isfile(path):
            raise _error(path, kind, "is no file", _CHECK_PATH, severity=severity)
        if size > max_bytes:
            raise _error(path, kind, "is absurdly large", "Restore the file.", severity=severity)
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise _error(
            path, kind, f"cannot be read ({error.strerror})", _CHECK_PATH, severity=severity
        ) from error
    except UnicodeDecodeError as error:
        raise _error(path, kind, f"is not UTF-8 text ({error})", "Convert it.", severity=severity) from error


def _read_xml(path: str) -> ElementTree.Element:
    text = _read_text(path, _MAX_XML_BYTES)
    kind = "unreadable annotations"
    # Entities that expand without end, or that read other files, can only be declared behind this word.
    if "<!DOCTYPE" in text:
        raise _error(path, kind, "has a DOCTYPE, which annotations do not need", "Remove it.")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise _error(path, kind, f"is not valid XML: {error}", "Restore or export it again.") from error


def _read_record(
    path: str, image_path: str, image_id: int, class_names: tuple[str, ...]
) -> tuple[Record, list[Fault]]:
    """Returns what a file says of its image, and the faults of single objects, which are not in the record."""
    root = _read_xml(path)
    width, height = (_number(path, root, f"size/{key}") for key in ("width", "height"))
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE) or width % 1 or height % 1:
        raise _error(
            path, "wrong 'size'", f"says its image is {width:g} wide and {height:g} high", "Correct 'size'."
        )
    if width * height > pixel_limit():
        raise _error(
            path,
            "absurdly large image",
            f"says its image has {height:g} x {width:g} pixels, where the limit is {pixel_limit()}",
            "Downscale the image, or correct 'size'.",
        )
    objects, faults = [], []
    for number, entry in enumerate(root.findall("object"), start=1):
        try:
            objects.append(_read_object(path, f"object {number}", entry, width, height, class_names))
        except DataError as error:
            faults.append(error.fault)
    boxes, classes, is_difficult = zip(*objects, strict=True) if objects else ((), (), ())
    record = Record(
        image_id=image_id,
        file_name=image_path,
        height=int(height),
        width=int(width),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        classes=np.array(classes, np.int32),
        is_crowd=np.array(is_difficult, bool),
    )
    return record, faults


def _read_object(
    path: str,
    label: str,
    entry: ElementTree.Element,
    width: float,
    height: float,
    class_names: tuple[str, ...],
) -> tuple[list[float], int, bool]:
    """Returns an object's clipped box, its class, and whether it is difficult."""
    name = (entry.findtext("name") or "").strip()
    if name not in class_names:
        raise _error(
            path,
            "unknown category_id",
            f"is of the unknown class {shown(name)}",
            "Correct it, or name the classes of your own data in config.data.class_names.",
            record=label,
        )
    edges = [_number(path, entry, f"bndbox/{key}", label) for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = edges[0] - 1, edges[1] - 1, edges[2], edges[3]
    has_box = f"has a box xmin, ymin, xmax, ymax = {edges}"
    if x1 >= x2 or y1 >= y2:
        raise _error(path, "empty box", f"{has_box} without width or height", _CORRECT, record=label)
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        where = f"with no part inside the image of {width:g} x {height:g} pixels (width x height)"
        raise _error(path, "box outside its image", f"{has_box} {where}", _CORRECT, record=label)
    box = [min(max(x1, 0.0), width), min(max(y1, 0.0), height), min(x2, width), min(y2, height)]
    if not (np.float32(box[0]) < np.float32(box[2]) and np.float32(box[1]) < np.float32(box[3])):
        raise _error(
            path, "box too small", f"{has_box} too small to be told from a line", _CORRECT, record=label
        )
    return box, class_names.index(name), _flag(path, entry, "difficult", label)


def _number(path: str, element: ElementTree.Element, key: str, label: str = "") -> float:
    text = element.findtext(key)
    try:
        value = float(text if text is not None else "")
    except ValueError:
        value = math.nan
    if not abs(value) < 1e30:  # also where it is NaN
        found = "has no" if text is None else f"has {shown(text.strip())} as its"
        what = f"{found} '{key}', which must be a number"
        raise _error(path, f"wrong '{key}'", what, "Correct the file.", record=label)
    return value


def _flag(path: str, element: ElementTree.Element, key: str, label: str) -> bool:
    text = (element.findtext(key) or "0").strip()
    if text not in ("0", "1"):
        what = f"has {shown(text)} as its '{key}', not 0 or 1"
        raise _error(path, f"wrong '{key}'", what, "Correct the file.", record=label)
    return text == "1"
