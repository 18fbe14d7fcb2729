"""What a data set looks like to the rest of the package, whatever its files look like."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from absl import logging
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from klbox_jax.data.masks import Segmentation

# Warnings of single faults are cut off here, and counted from then on.
MAX_WARNINGS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """Something wrong with a data set; its text is a sentence and the remedy.

    Attributes:
        kind: what to count it with, such as "box outside its image".
        file: the file at fault.
        record: the entry of the file, such as "annotation 7"; empty for the file itself.
        what: the predicate of the sentence.
        remedy: what to do about it, as a sentence.
        severity: "fatal" if nothing can be learnt from the data set, "error" if an image has to be left out,
            "warning" if it can be used as it is.
    """

    kind: str
    file: str
    record: str = ""
    what: str
    remedy: str
    severity: str = "error"

    def __str__(self) -> str:
        return self.sentence()

    def sentence(self, more: str = "") -> str:
        """Returns the text, with `more` at the end of the sentence."""
        subject = f"{self.file}: {self.record}" if self.record else self.file
        return printable(f"{subject} {self.what}{more}. {self.remedy}")


class DataError(ValueError):
    """A data set is unusable; the message names the file, the record and the remedy.

    Attributes:
        fault: what is wrong, in its parts.
    """

    def __init__(self, problem: str | Fault, *, more: str = ""):
        """Takes a fault, or a text for one that concerns the whole data set; `more` ends its sentence."""
        if isinstance(problem, str):
            super().__init__(problem)
            problem = Fault(kind="data set", file="", what=problem, remedy="", severity="fatal")
        else:
            super().__init__(problem.sentence(more))
        self.fault = problem


# What a reader does with the faults that it finds. If it returns, the reader leaves out the images at fault.
Report = Callable[[Sequence[Fault]], None]


def refuse(faults: Sequence[Fault]) -> None:
    """A `Report` that raises DataError for the first fault, if there are any."""
    if faults:
        raise DataError(faults[0], more=f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


class LeaveOut:
    """A `Report` that warns of faults, so that their images are left out; raises DataError for fatal ones.

    Attributes:
        count: faults that were reported so far.
    """

    def __init__(self):
        self.count = 0

    def __call__(self, faults: Sequence[Fault]) -> None:
        """Warns of the first faults one by one, and then that there are more."""
        refuse([fault for fault in faults if fault.severity == "fatal"])
        for fault in faults:
            self.count += 1
            if self.count <= MAX_WARNINGS:
                logging.warning("left out: %s", fault)
        if self.count > MAX_WARNINGS >= self.count - len(faults):
            logging.warning("more images are left out; python -m klbox_jax.data.check lists every fault")


def printable(text: str) -> str:
    """Returns a text without what a terminal might obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def shown(value: Any) -> str:
    """Returns a value for a message, on one line and cut short: a file may hold anything."""
    try:
        text = ascii(value) if not isinstance(value, (list, dict)) else json.dumps(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One image's annotation, in pixels of the file (after its EXIF orientation is applied).

    Attributes:
        image_id: id in the data set; unique.
        file_name: where the image lies, for messages.
        height, width: size of the image in pixels.
        boxes: `x1, y1, x2, y2`, continuous edges, inside the image.
        classes: dense class index, 0 to K - 1.
        is_crowd: not an object to learn: a region of many objects, or one that the data set marks as
            difficult. Ignored in training.
        box_stds: label noise of each edge in pixels, or None where unknown.
        segmentations: the pixels of each object, as `klbox_jax.data.masks` describes them, or None where
            unknown or not asked for.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: Float[ndarray, "n 4"]
    classes: Int[ndarray, " n"]
    is_crowd: Bool[ndarray, " n"]
    box_stds: Float[ndarray, "n 4"] | None = None
    segmentations: tuple[Segmentation, ...] | None = None


@runtime_checkable
class Source(Protocol):
    """A detection data set with random access.

    Attributes:
        name: for messages and result files.
        class_names: name of each dense class index.
        category_ids: the data set's own category id of each dense class index.
        records: the annotation of each image, in a fixed order; held in memory.
        fingerprint: digest of the content, for result files; None if there is none.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]
    fingerprint: str | None

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`, of exactly the record's size."""
        ...

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary that detections are evaluated against, with the original ids."""
        ...


def coco_dictionary(source: Source) -> dict:
    """Returns the COCO dictionary of a source's records, for sources whose files hold no such dictionary.

    Annotations are numbered from 1 and have the records' boxes; `area` is that of the box.
    """
    annotations = []
    for record in source.records:
        boxes = record.boxes.astype(float).tolist()
        for (x1, y1, x2, y2), index, is_crowd in zip(boxes, record.classes, record.is_crowd, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": source.category_ids[index],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(is_crowd),
                }
            )
    return {
        "info": {"description": source.name},
        "images": [
            {"id": r.image_id, "file_name": r.file_name, "height": r.height, "width": r.width}
            for r in source.records
        ],
        "annotations": annotations,
        "categories": [
            {"id": category, "name": name}
            for category, name in zip(source.category_ids, source.class_names, strict=True)
        ],
    }
