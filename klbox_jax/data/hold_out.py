"""Held-out images: a fraction of a training set that is not trained on, for a later fit such as the calibration."""

import hashlib
from collections.abc import Iterable

from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.source import Source


class EmptyPartError(ValueError):
    """A share holds out all images of a data set, or none."""


def is_held_out(image_id: int, share: float) -> bool:
    """Returns True if an image is held out, which depends on its id and the share only.

    So every seed, config and process holds out the same images, in whatever order the file lists them, and a larger
    share includes the images of a smaller one.
    """
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_held_out(source: Source, share: float) -> tuple[Source, Source]:
    """Splits a source into the images to train on and the held-out images, about `share` of all.

    Raises:
        ValueError: the share is not between 0 and 1.
        EmptyPartError: one of the two parts has no image. A ValueError.
    """
    if not 0 < share < 1:
        raise ValueError(f"config.data.hold_out = {share} is not a share; choose a number between 0 and 1")
    rows: tuple[list[int], list[int]] = ([], [])
    for row, record in enumerate(source.records):
        rows[is_held_out(record.image_id, share)].append(row)
    if not all(rows):
        raise EmptyPartError(
            f"config.data.hold_out = {share} keeps {len(rows[1])} of the {len(source.records)} images of {source.name} "
            "out of the training; choose a share that leaves images on both sides"
        )
    return Subset(source, rows[0], name=source.name), Subset(
        source, rows[1], name=f"{source.name}, held out {share:g}"
    )


class Subset:
    """A subset of the images of a source, as a `klbox_jax.data.source.Source`.

    Attributes:
        fingerprint: that of the source, or None.
    """

    def __init__(self, source: Source, rows: Iterable[int], *, name: str):
        """Selects rows of `source.records`, in the given order."""
        self._source, self._rows = source, tuple(rows)
        self.name = name
        self.class_names, self.category_ids = source.class_names, source.category_ids
        self.records = [source.records[row] for row in self._rows]
        self.fingerprint = source.fingerprint

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        return self._source.load_image(self._rows[index])

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary of the source, with only these images and their annotations."""
        content = self._source.coco_ground_truth()
        ids = {record.image_id for record in self.records}
        return content | {
            "images": [entry for entry in content["images"] if entry["id"] in ids],
            "annotations": [entry for entry in content["annotations"] if entry["image_id"] in ids],
        }
