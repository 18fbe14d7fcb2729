"""What a data set looks like to the rest of the package, whatever its files look like."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from klbox_jax.data.masks import Segmentation


class DataError(ValueError):
    """A data set is unusable; the message names the file, the record and the remedy."""


def refuse(where: str, faults: Sequence[str], remedy: str) -> None:
    """Raises DataError for the first of the faults, which are all of one kind, if there are any."""
    if faults:
        more = f" (and {len(faults) - 1} more of this kind)" if len(faults) > 1 else ""
        raise DataError(f"{where}: {faults[0]}{more}. {remedy}")


def shown(value: Any) -> str:
    """Returns a value for a message, on one line and cut short: a file may hold anything."""
    text = ascii(value) if not isinstance(value, (list, dict)) else json.dumps(value)
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
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]

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
