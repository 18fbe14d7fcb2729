"""The interface of a data set (`Source`, `Record`) and the handling of its faults."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from absl import logging
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from klbox_jax.data.masks import Segmentation

# After this many warnings about single faults, the rest is only counted.
MAX_WARNINGS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A problem in a data set. Its text is a sentence and the remedy.

    Attributes:
        kind: the group that it is counted in, such as "box outside its image".
        file: the file that has the problem.
        record: the entry of the file, such as "annotation 7"; empty for the file itself.
        what: the predicate of the sentence.
        remedy: a sentence that says what to do.
        severity: "fatal" if the data set cannot be used at all, "error" if an image has to be left out, "warning"
            if it is used unchanged but seems wrong, "note" for a remark.
    """

    kind: str
    file: str
    record: str = ""
    what: str
    remedy: str
    severity: str = "error"

    def __str__(self) -> str:
        return self.sentence()

    @property
    def is_serious(self) -> bool:
        """True if an image, or the data set, cannot be used."""
        return self.severity in ("fatal", "error")

    def sentence(self, more: str = "") -> str:
        """Returns the text, with `more` at the end of the sentence."""
        subject = f"{self.file}: {self.record}" if self.record else self.file
        return printable(f"{subject} {self.what}{more}. {self.remedy}")


class DataError(ValueError):
    """A data set is unusable; the message names the file, the record and the remedy.

    Attributes:
        fault: the problem in its parts.
    """

    def __init__(self, problem: str | Fault, *, more: str = ""):
        """Takes a fault, or a text for a problem of the whole data set; `more` ends the sentence of a fault."""
        if isinstance(problem, str):
            super().__init__(problem)
            problem = Fault(kind="data set", file="", what=problem, remedy="", severity="fatal")
        else:
            super().__init__(problem.sentence(more))
        self.fault = problem


# A reader calls its handler with the faults that it finds. If the handler returns, the reader leaves out the images
# of these faults.
FaultHandler = Callable[[Sequence[Fault]], None]


def raise_fault(faults: Sequence[Fault]) -> None:
    """Logs warnings, and raises DataError for the first other fault, if there is one; a `FaultHandler`."""
    serious = _log_warnings(faults)
    if serious:
        raise DataError(serious[0], more=f" (and {len(serious) - 1} more)" if len(serious) > 1 else "")


class SkipFaulty:
    """A `FaultHandler` that logs faults, so that their images are left out; raises DataError for fatal ones.

    Attributes:
        count: number of faults so far that left out an image.
    """

    def __init__(self):
        self.count = 0

    def __call__(self, faults: Sequence[Fault]) -> None:
        """Logs the first faults one by one, then one line that there are more."""
        faults = _log_warnings(faults)
        raise_fault([fault for fault in faults if fault.severity == "fatal"])
        for fault in faults:
            self.count += 1
            if self.count <= MAX_WARNINGS:
                logging.warning("left out: %s", fault)
        if self.count > MAX_WARNINGS >= self.count - len(faults):
            logging.warning("more images are left out; python -m klbox_jax.data.check lists every fault")


def _log_warnings(faults: Sequence[Fault]) -> list[Fault]:
    """Logs the first warning or note of each kind with the number of others, and returns the serious faults."""
    warnings = [fault for fault in faults if not fault.is_serious]
    counts = Counter(fault.kind for fault in warnings)
    for kind, count in counts.items():
        first = next(fault for fault in warnings if fault.kind == kind)
        logging.warning("%s", first.sentence(f" (and {count - 1} more)" if count > 1 else ""))
    return [fault for fault in faults if fault.is_serious]


def printable(text: str) -> str:
    """Returns a text with escapes in place of control characters, which a terminal might obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """Returns a value for a message: on one line, in ASCII with escapes, and cut to 80 characters."""
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
        file_name: path of the image, for messages.
        height, width: size of the image in pixels.
        boxes: `x1, y1, x2, y2`, continuous edges, inside the image.
        classes: dense class index, 0 to K - 1.
        is_crowd: True for a region of many objects, or an object that the data set marks as difficult.
            Training ignores it.
        box_stds: standard deviation of the label noise of each edge in pixels, or None if unknown.
        segmentations: the mask of each object, in a form of `klbox_jax.data.masks`, or None if unknown or not
            requested.
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

    Any object with these attributes and methods is a data set; it needs no base class. `klbox_jax.data.build` takes
    a function that makes it.

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
    """Returns the COCO dictionary of a source's records, for formats other than COCO's.

    Annotations are numbered from 1 and have the boxes of the records; `area` is that of the box.
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
