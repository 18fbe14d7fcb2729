"""Reader of annotation files in PASCAL VOC's XML format."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from klbox_jax.data.coco_entries import MAX_SIDE, is_class_name
from klbox_jax.data.image import pixel_limit
from klbox_jax.data.source import DataError, Fault, Record, shown
from klbox_jax.data.text_files import read_text

# Enough for ten thousand objects.
_MAX_XML_BYTES = 2**22
_CORRECT = "Correct or remove the object."
# Share of boxes with fractions above which a set is taken for one of continuous edges; VOC 2012 has a few.
_MANY_FRACTIONS = 0.02


class EdgeCounts:
    """Counts the signs that boxes are not counted from pixel 1."""

    def __init__(self):
        self.boxes = self.at_zero = self.fractions = 0

    def add(self, edges: Sequence[float]) -> None:
        """Counts one box, `xmin, ymin, xmax, ymax` as written."""
        self.boxes += 1
        self.at_zero += edges[0] == 0 or edges[1] == 0
        self.fractions += any(edge % 1 for edge in edges)

    def faults(self, root: str, split: str) -> list[Fault]:
        """Returns a warning if the boxes seem to count from 0."""
        if not self.at_zero and self.fractions <= _MANY_FRACTIONS * self.boxes:
            return []
        signs = [f"{self.at_zero} begin at pixel 0"] if self.at_zero else []
        signs += [f"{self.fractions} have fractions of pixels"] if self.fractions else []
        return [
            Fault(
                kind="first pixel",
                file=root,
                record=split,
                what=f"seems to count pixels from 0, not from 1 as VOC does: of {self.boxes} boxes {', '.join(signs)}",
                remedy="Set config.data.voc_first_pixel = 0 unless the files are VOC's own; otherwise left and upper "
                "edges are one pixel off.",
                severity="warning",
            )
        ]


class VocReader(NamedTuple):
    """Reads annotation files.

    Attributes:
        class_names: every class that they may name.
        first_pixel: number of the first pixel of a row.
    """

    class_names: tuple[str, ...]
    first_pixel: int

    def read_record(
        self, path: str, image_path: str, image_id: int, edges: EdgeCounts
    ) -> tuple[Record, list[Fault]]:
        """Returns the annotation of an image, and the faults of single objects, which are not in the record."""
        root = _read_xml(path)
        width, height = (_number(path, root, f"size/{key}") for key in ("width", "height"))
        _check_size(path, width=width, height=height)
        objects, faults = [], []
        for number, entry in enumerate(root.findall("object"), start=1):
            try:
                objects.append(self._read_object(path, f"object {number}", entry, (width, height), edges))
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
        self,
        path: str,
        label: str,
        entry: ElementTree.Element,
        image_size: tuple[float, float],
        edges: EdgeCounts,
    ) -> tuple[list[float], int, bool]:
        """Returns an object's clipped box, its class, and True if it is difficult."""
        name = (entry.findtext("name") or "").strip()
        if name not in self.class_names:
            raise _error(
                path,
                "unknown category_id",
                f"is of the unknown class {shown(name)}",
                "Correct it, or name the classes of your own data in config.data.class_names.",
                record=label,
            )
        written = [_number(path, entry, f"bndbox/{key}", label) for key in ("xmin", "ymin", "xmax", "ymax")]
        edges.add(written)
        box = _clipped_box(path, label, written, image_size, self.first_pixel)
        return box, self.class_names.index(name), _flag(path, entry, "difficult", label)


def collect_class_names(folders: Sequence[str]) -> tuple[str, ...]:
    """Returns the sorted names of all classes that the XML files of some folders name; skips unreadable files."""
    names: set[str] = set()
    for folder in folders:
        for file in sorted(os.listdir(folder)):
            if not file.lower().endswith(".xml"):
                continue
            try:
                root = _read_xml(os.path.join(folder, file))
            except DataError:
                continue
            names |= {(entry.findtext("name") or "").strip() for entry in root.findall("object")}
    return tuple(sorted(name for name in names if is_class_name(name)))


def _check_size(path: str, *, width: float, height: float) -> None:
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


def _clipped_box(
    path: str, label: str, written: list[float], image_size: tuple[float, float], first_pixel: int
) -> list[float]:
    """Returns `x1, y1, x2, y2` with continuous edges, cut at the image."""
    width, height = image_size
    x1, y1, x2, y2 = written[0] - first_pixel, written[1] - first_pixel, written[2], written[3]
    has_box = f"has a box xmin, ymin, xmax, ymax = {written}"
    if x1 >= x2 or y1 >= y2:
        raise _error(path, "empty box", f"{has_box} without width or height", _CORRECT, record=label)
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        where = f"with no part inside the image of {width:g} x {height:g} pixels (width x height)"
        raise _error(path, "box outside its image", f"{has_box} {where}", _CORRECT, record=label)
    box = [min(max(x1, 0.0), width), min(max(y1, 0.0), height), min(x2, width), min(y2, height)]
    if not (np.float32(box[0]) < np.float32(box[2]) and np.float32(box[1]) < np.float32(box[3])):
        raise _error(
            path, "box too small", f"{has_box} of no width or height in float32", _CORRECT, record=label
        )
    return box


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


def _read_xml(path: str) -> ElementTree.Element:
    text = read_text(path, _MAX_XML_BYTES, xml=True)
    kind = "unreadable annotations"
    # Only a DOCTYPE can declare entities, which may expand without end or read other files.
    if "<!DOCTYPE" in text:
        raise _error(path, kind, "has a DOCTYPE, which annotations do not need", "Remove it.")
    try:
        # The text is decoded, so that a declared encoding says nothing any more.
        return ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    except (ElementTree.ParseError, ValueError) as error:
        raise _error(path, kind, f"is not valid XML: {error}", "Restore or export it again.") from error


def _error(
    path: str, kind: str, what: str, remedy: str, *, record: str = "", severity: str = "error"
) -> DataError:
    fault = Fault(kind=kind, file=path, record=record, what=what, remedy=remedy, severity=severity)
    return DataError(fault)
