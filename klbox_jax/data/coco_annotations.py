"""Reads an annotation file in COCO's JSON format, and checks all of it.

Each fault is one sentence with the file, the record and the remedy. What becomes of the faults is for a `Report` of
`klbox_jax.data.source` to say: where it lets the reader go on, an image is left out if its entry or one of its
annotations is at fault. To learn the rest of the image would be to learn that the object at fault is background.
"""

import dataclasses

import numpy as np
from absl import logging
from jaxtyping import Bool, Float
from numpy import ndarray

from klbox_jax.data.coco_entries import EntryFaults, is_image_id, read_json, sound_entries
from klbox_jax.data.masks import Segmentation, parse_segmentation
from klbox_jax.data.source import Fault, Report, refuse, shown


@dataclasses.dataclass(frozen=True)
class CocoAnnotations:
    """A checked annotation file.

    Attributes:
        images, annotations: the file's entries, in its order. The annotations are without their masks.
        categories: the file's entries, in the order of their ids.
        boxes: `x1, y1, x2, y2` of each annotation, clipped to its image.
        has_extent: False for an annotation whose box has no width or no height.
        segmentations: the mask of each annotation, or None where masks were not asked for.
    """

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    boxes: Float[ndarray, "n 4"]
    has_extent: Bool[ndarray, " n"]
    segmentations: list[Segmentation] | None

    def without(self, image_ids: set[int]) -> "CocoAnnotations":
        """Returns what remains without some images and their annotations."""
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
    path: str, *, masks: bool | None, skip_empty_boxes: bool, report: Report = refuse
) -> CocoAnnotations:
    """Returns a checked annotation file.

    Args:
        path: the JSON file.
        masks: check and keep the segmentations; None if any annotation has one.
        skip_empty_boxes: mark and warn of boxes of no width or no height instead of refusing them. COCO's own
            train2017 has two of them, of height 0.
        report: takes the faults of one check after the other.

    Raises:
        DataError: the file is unusable, or (from `report`) an entry of it is.
    """
    content = read_json(path)
    images, annotations, categories = (
        sound_entries(path, content, section, report) for section in ("images", "annotations", "categories")
    )
    report(_reference_faults(path, content, annotations))

    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
    known = {entry["id"] for entry in categories}
    annotations = [
        entry for entry in annotations if entry["image_id"] in sizes and entry["category_id"] in known
    ]
    # Whoever is at fault takes the whole image along.
    lost = _lost_ids(content["images"], images, "id")
    lost |= _lost_ids(content["annotations"], annotations, "image_id")

    boxes, has_extent, faults = _boxes(path, annotations, sizes, skip_empty=skip_empty_boxes)
    report([fault for _, fault in faults])
    lost |= {annotations[i]["image_id"] for i, _ in faults}
    segmentations = None
    if masks is None:
        masks = any(entry.get("segmentation") for entry in annotations)
    if masks:
        segmentations, faults = _segmentations(path, annotations, sizes)
        report([fault for _, fault in faults])
        lost |= {annotations[i]["image_id"] for i, _ in faults}
    for entry in annotations:  # They are most of the file, and those that are wanted lie smaller elsewhere.
        entry.pop("segmentation", None)
    return CocoAnnotations(
        images=images,
        annotations=annotations,
        categories=sorted(categories, key=lambda category: category["id"]),
        boxes=boxes,
        has_extent=has_extent,
        segmentations=segmentations,
    ).without(lost)


def _lost_ids(before: list, after: list[dict], key: str) -> set[int]:
    """Returns the image ids of the entries that were left out."""
    if len(before) == len(after):
        return set()
    kept = {id(entry) for entry in after}
    lost = [entry for entry in before if isinstance(entry, dict) and id(entry) not in kept]
    return {entry[key] for entry in lost if is_image_id(entry.get(key))}


def _reference_faults(path: str, content: dict, annotations: list[dict]) -> list[Fault]:
    faults = []
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        # Entries that were left out count as listed: what is wrong with them is known already.
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
    """Returns each annotation's clipped `x1, y1, x2, y2`, float32, whether it has width and height, and the faults."""
    xywh = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    limits = np.array([sizes[entry["image_id"]][::-1] for entry in annotations], np.float64).reshape(-1, 2)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(corners, 0, np.tile(limits, 2)).astype(np.float32)
    has_extent = (xywh[:, 2:] > 0).all(axis=1)
    is_negative = (xywh[:, 2:] < 0).any(axis=1)
    is_outside = has_extent & ((corners[:, :2] >= limits) | (corners[:, 2:] <= 0)).any(axis=1)

    def described(i: int, fault: str) -> str:
        entry = annotations[i]
        return f"has a box {fault}: {shown(entry['bbox'])} in image {entry['image_id']}"

    is_flat = ~has_extent & ~is_negative
    no_extent = "or set config.data.skip_empty_boxes = True to train without it."
    kinds = [
        ("box with a negative side", "with a negative width or height", is_negative, ""),
        ("box outside its image", "with no part inside its image", is_outside, ""),
        (
            "box too small",
            "too small to be told from a line",
            has_extent & ~is_outside & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1),
            "",
        ),
    ]
    if not skip_empty:
        kinds.insert(0, ("empty box", "with no positive width and height", is_flat, no_extent))
    faults = [
        (
            i,
            Fault(
                kind=kind,
                file=path,
                record=f"annotation {annotations[i]['id']}",
                what=described(i, sentence),
                remedy=f"Correct or remove the annotation{', ' + more if more else '.'}",
            ),
        )
        for kind, sentence, is_fault, more in kinds
        for i in np.flatnonzero(is_fault).tolist()
    ]
    flat = np.flatnonzero(is_flat).tolist()
    if skip_empty and flat:
        logging.warning(
            "%s: annotation %d %s. %d such annotations are left out of training; the evaluation keeps them.",
            path,
            annotations[flat[0]]["id"],
            described(flat[0], "without width or height"),
            len(flat),
        )
    return boxes, has_extent, faults


def _segmentations(
    path: str, annotations: list[dict], sizes: dict[int, tuple[int, int]]
) -> tuple[list[Segmentation], EntryFaults]:
    """Returns each annotation's mask, in place of a malformed one an empty one, and the faults."""
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
                what=f"has as its mask {error}",
                remedy="Correct or remove the annotation, or set config.data.mask_size to 0 to train without masks.",
            )
            faults.append((i, fault))
        segmentations.append(segmentation)
    return segmentations, faults
