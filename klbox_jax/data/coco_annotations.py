"""Reader of an annotation file in COCO's JSON format, with a check of the whole file.

Each fault is one sentence with the file, the record and the remedy. A `FaultHandler` decides whether reading goes on.
If it does, an image is left out if its entry or one of its annotations has a fault: an image with a missing object
would teach the detector that the object is background.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from klbox_jax.data.coco_entries import EntryFaults, is_id, read_json, valid_entries
from klbox_jax.data.masks import Segmentation, parse_segmentation
from klbox_jax.data.source import Fault, FaultHandler, raise_fault, shown


@dataclasses.dataclass(frozen=True)
class CocoAnnotations:
    """A checked annotation file.

    Attributes:
        images, annotations: the entries of the file, in its order. The annotations have no `segmentation` any more.
        categories: the entries of the file, in the order of their ids.
        boxes: `x1, y1, x2, y2` of each annotation, clipped to its image.
        has_extent: False for an annotation whose box has no width or no height.
        segmentations: the mask of each annotation, or None if masks were not requested.
    """

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    boxes: Float[ndarray, "n 4"]
    has_extent: Bool[ndarray, " n"]
    segmentations: list[Segmentation] | None

    def without(self, image_ids: set[int]) -> "CocoAnnotations":
        """Returns the annotations without some images and their objects."""
        if not image_ids:
            return self
        kept = np.array([entry["image_id"] not in image_ids for entry in self.annotations], bool)
        rows = np.flatnonzero(kept).tolist()
        masks = self.segmentations
        return dataclasses.replace(
            self,
            images=[entry for entry in self.images if entry["id"] not in image_ids],
            annotations=[self.annotations[row] for row in rows],
            boxes=self.boxes[kept],
            has_extent=self.has_extent[kept],
            segmentations=None if masks is None else [masks[row] for row in rows],
        )


def read_coco_annotations(
    path: str, *, masks: bool, skip_empty_boxes: bool, on_fault: FaultHandler = raise_fault
) -> CocoAnnotations:
    """Returns a checked annotation file.

    Args:
        path: the JSON file.
        masks: check and keep the segmentations; every annotation must have one.
        skip_empty_boxes: mark boxes of no width or no height, with a warning, instead of refusing them. COCO's own
            train2017 has two of them, of height 0.
        on_fault: receives the faults of one check after the other.

    Raises:
        DataError: the file is unusable, or (from `on_fault`) an entry of it is.
    """
    content = read_json(path)
    images, annotations, categories = (
        valid_entries(path, content, section, on_fault) for section in ("images", "annotations", "categories")
    )
    on_fault(_reference_faults(path, content, annotations))

    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
    known = {entry["id"] for entry in categories}
    annotations = [
        entry for entry in annotations if entry["image_id"] in sizes and entry["category_id"] in known
    ]
    # The whole image is lost with a faulty entry.
    lost = _lost_ids(content["images"], images, "id")
    lost |= _lost_ids(content["annotations"], annotations, "image_id")

    boxes, has_extent, faults = _boxes(path, annotations, sizes, skip_empty=skip_empty_boxes)
    on_fault([fault for _, fault in faults])
    lost |= _faulty_images(annotations, faults)
    segmentations = None
    if masks:
        segmentations, faults = _segmentations(path, annotations, sizes)
        on_fault([fault for _, fault in faults])
        lost |= _faulty_images(annotations, faults)
    for entry in annotations:  # Segmentations are most of the file, and are kept in a smaller form.
        entry.pop("segmentation", None)
    return CocoAnnotations(
        images=images,
        annotations=annotations,
        categories=sorted(categories, key=lambda category: category["id"]),
        boxes=boxes,
        has_extent=has_extent,
        segmentations=segmentations,
    ).without(lost)


def _faulty_images(annotations: list[dict], faults: EntryFaults) -> set[int]:
    """Returns the ids of the images that are lost by faults of their annotations."""
    return {annotations[i]["image_id"] for i, fault in faults if fault.is_serious}


def _lost_ids(before: list, after: list[dict], key: str) -> set[int]:
    """Returns the image ids of the entries that were left out."""
    if len(before) == len(after):
        return set()
    kept = {id(entry) for entry in after}
    lost = [entry for entry in before if isinstance(entry, dict) and id(entry) not in kept]
    return {entry[key] for entry in lost if is_id(entry.get(key))}


def _reference_faults(path: str, content: dict, annotations: list[dict]) -> list[Fault]:
    faults = []
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        # Entries that were left out count as listed, because their own faults are already reported.
        listed = [entry.get("id") for entry in content[section] if isinstance(entry, dict)]
        known = {number for number in listed if type(number) is int}
        faults += [
            Fault(
                kind=f"unknown {key}",
                file=path,
                record=f"annotation {entry['id']}",
                what=f"has {key} {entry[key]}, which '{section}' does not list",
                remedy="Add the missing entry, or remove the annotation.",
            )
            for entry in annotations
            if entry[key] not in known
        ]
    return faults


def _boxes(
    path: str, annotations: list[dict], sizes: dict[int, tuple[int, int]], *, skip_empty: bool
) -> tuple[Float[ndarray, "n 4"], Bool[ndarray, " n"], EntryFaults]:
    """Returns each annotation's clipped `x1, y1, x2, y2`, float32, True where it has an extent, and the faults."""
    xywh = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    limits = np.array([sizes[entry["image_id"]][::-1] for entry in annotations], np.float64).reshape(-1, 2)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(corners, 0, np.tile(limits, 2)).astype(np.float32)
    has_extent = (xywh[:, 2:] > 0).all(axis=1)
    is_negative = (xywh[:, 2:] < 0).any(axis=1)
    is_outside = has_extent & ((corners[:, :2] >= limits) | (corners[:, 2:] <= 0)).any(axis=1)
    is_flat = ~has_extent & ~is_negative
    is_too_small = has_extent & ~is_outside & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)

    correct = "Correct or remove the annotation."
    skip = "Correct or remove the annotation, or set config.data.skip_empty_boxes = True to train without it."
    flat = ("empty box", "with no positive width and height", is_flat, skip, "error")
    if skip_empty:
        kept = "Training leaves it out, and the evaluation keeps it; correct it, if there are many."
        flat = ("empty box", "without width or height", is_flat, kept, "warning")
    kinds = [
        flat,
        ("box with a negative side", "with a negative width or height", is_negative, correct, "error"),
        ("box outside its image", "with no part inside its image", is_outside, correct, "error"),
        ("box too small", "of no width or height in float32", is_too_small, correct, "error"),
    ]
    faults = [
        (
            i,
            Fault(
                kind=kind,
                file=path,
                record=f"annotation {annotations[i]['id']}",
                what=f"has a box {reason}: {shown(annotations[i]['bbox'])} in image {annotations[i]['image_id']}",
                remedy=remedy,
                severity=severity,
            ),
        )
        for kind, reason, is_fault, remedy, severity in kinds
        for i in np.flatnonzero(is_fault).tolist()
    ]
    return boxes, has_extent, faults


def _segmentations(
    path: str, annotations: list[dict], sizes: dict[int, tuple[int, int]]
) -> tuple[list[Segmentation], EntryFaults]:
    """Returns the mask of each annotation, an empty one if it is malformed, and the faults."""
    segmentations, faults = [], []
    for i, entry in enumerate(annotations):
        height, width = sizes[entry["image_id"]]
        try:
            segmentation = parse_segmentation(entry.get("segmentation"), height=height, width=width)
            if isinstance(segmentation, ndarray) and not segmentation[1::2].any():
                raise ValueError("run lengths without a pixel of the object")
        except ValueError as error:
            segmentation = ()
            fault = Fault(
                kind="malformed mask",
                file=path,
                record=f"annotation {entry['id']} in image {entry['image_id']}",
                what=f"has a malformed mask: {error}",
                remedy="Correct or remove the annotation, or set config.data.mask_size to 0 to train without masks.",
            )
            faults.append((i, fault))
        segmentations.append(segmentation)
    return segmentations, faults
