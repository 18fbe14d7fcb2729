"""What a data set looks like to the rest of the package, whatever its files look like."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray


class DataError(ValueError):
    """A data set is unusable; the message names the file, the record and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One image's annotation, in pixels of the file (after its EXIF orientation is applied).

    Attributes:
        image_id: id in the data set; unique.
        file_name: where the image lies, for messages.
        height, width: size of the image in pixels.
        boxes: `x1, y1, x2, y2`, continuous edges, inside the image.
        classes: dense class index, 0 to K - 1.
        is_crowd: region of many objects.
        box_stds: label noise of each edge in pixels, or None where unknown.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: Float[ndarray, "n 4"]
    classes: Int[ndarray, " n"]
    is_crowd: Bool[ndarray, " n"]
    box_stds: Float[ndarray, "n 4"] | None = None


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
