"""A share of a training set that is kept out of the training, so that something can be fitted on it afterwards."""

import hashlib
from collections.abc import Iterable

from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.source import Source


def is_held_out(image_id: int, share: float) -> bool:
    """Returns whether an image is held out: a function of its id and the share, and of nothing else.

    So the same images are held out by every seed, config and process, wherever the image stands in its file, and
    those of a larger share include those of a smaller one.
    """
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_held_out(source: Source, share: float) -> tuple[Source, Source]:
    """Returns what remains of a source, and the images that are held out, about `share` of all.

    Raises:
        ValueError: the share is not between 0 and 1, or leaves one of the two without an image.
    """
    if not 0 < share < 1:
        raise ValueError(f"config.data.hold_out = {share} is not a share; choose a number between 0 and 1")
    rows: tuple[list[int], list[int]] = ([], [])
    for row, record in enumerate(source.records):
        rows[is_held_out(record.image_id, share)].append(row)
    if not all(rows):
        raise ValueError(
            f"config.data.hold_out = {share} keeps {len(rows[1])} of the {len(source.records)} images of {source.name} "
            "out of the training; choose a share that leaves images on both sides"
        )
    return Subset(source, rows[0], name=source.name), Subset(
        source, rows[1], name=f"{source.name}, held out {share:g}"
    )


class Subset:
    """Some images of a source, as a `klbox_jax.data.source.Source`.

    Attributes:
        fingerprint: that of the source, or None.
    """

    def __init__(self, source: Source, rows: Iterable[int], *, name: str):
        """Takes the rows of `source.records`, in the order that they are to have."""
        self._source, self._rows = source, tuple(rows)
        self.name = name
        self.class_names, self.category_ids = source.class_names, source.category_ids
        self.records = [source.records[row] for row in self._rows]
        self.fingerprint = source.fingerprint

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        return self._source.load_image(self._rows[index])

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary of the source, with these images and their annotations alone."""
        content = self._source.coco_ground_truth()
        ids = {record.image_id for record in self.records}
        return content | {
            "images": [entry for entry in content["images"] if entry["id"] in ids],
            "annotations": [entry for entry in content["annotations"] if entry["image_id"] in ids],
        }
