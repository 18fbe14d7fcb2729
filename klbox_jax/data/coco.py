"""Reads detection data sets in COCO's JSON format.

The layout is that of COCO itself:

    root/annotations/instances_{split}.json
    root/{split}/<file_name of each image>

The whole annotation file is checked before anything is trained on it (`klbox_jax.data.coco_annotations`), and so
is every image file.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.coco_annotations import CocoAnnotations, read_coco_annotations
from klbox_jax.data.image import check_image, decode_image
from klbox_jax.data.masks import to_coco
from klbox_jax.data.source import DataError, Fault, Record, Report, refuse, shown


class CocoSource:
    """A folder in COCO's layout, as `klbox_jax.data.source.Source`.

    Classes are numbered densely in the order of their category ids. Images without objects are kept. Boxes
    are clipped to the image; those of no width or no height are left out.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]
    fingerprint: str | None = None
    annotation_file: str

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        annotation_file: str | os.PathLike | None = None,
        image_dir: str | os.PathLike | None = None,
        masks: bool | None = False,
        skip_empty_boxes: bool = False,
        check_images: bool = True,
        report: Report = refuse,
    ):
        """Reads and checks the annotations, and the header and end of every image file.

        Args:
            root: the data set's folder.
            split: e.g. `train2017`.
            annotation_file: relative to `root`; by default `annotations/instances_{split}.json`.
            image_dir: relative to `root`; by default `{split}`.
            masks: read the objects' masks too; every annotation must have one. None reads those of files that have
                any.
            skip_empty_boxes: leave boxes of no width or height out of the records, with a warning, instead of
                refusing them; the evaluation keeps them.
            check_images: look at every image file now (0.1 ms each), not only when it is read.
            report: takes what is wrong with single images and annotations; such images are left out.

        Raises:
            DataError: the folder or its annotation file is unusable, or (from `report`) an image.
        """
        self.name = f"{os.path.basename(os.path.abspath(root))}/{split}"
        self.annotation_file = os.path.join(root, annotation_file or f"annotations/instances_{split}.json")
        self._image_dir = os.path.join(root, image_dir or split)
        for folder in (os.fspath(root), self._image_dir):
            if not os.path.isdir(folder):
                raise DataError(f"{folder} is not a folder. Check the path of the data set and the split.")
        annotations = read_coco_annotations(
            self.annotation_file, masks=masks, skip_empty_boxes=skip_empty_boxes, report=report
        )
        annotations = self._without_paths_outside(annotations, report)
        if check_images:
            annotations = self._without_unusable_images(annotations, report)
        self.category_ids = tuple(category["id"] for category in annotations.categories)
        self.class_names = tuple(category["name"] for category in annotations.categories)
        self._annotations = annotations
        self.records = self._make_records()

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        record = self.records[index]
        return decode_image(record.file_name, height=record.height, width=record.width)

    def coco_ground_truth(self) -> dict:
        """Returns a new COCO dictionary, complete for pycocotools, with the file's own boxes and ids.

        It has the masks if the source was made with them. Where an annotation has the id 0, all are numbered
        anew from 1: pycocotools takes a match with id 0 for no match.
        """
        content = self._annotations
        renumber = any(entry["id"] == 0 for entry in content.annotations)
        annotations = [
            {
                "id": number if renumber else entry["id"],
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": list(entry["bbox"]),
                "area": entry.get("area", entry["bbox"][2] * entry["bbox"][3]),
                "iscrowd": int(entry.get("iscrowd", 0)),
            }
            for number, entry in enumerate(content.annotations, start=1)
        ]
        if content.segmentations is not None:
            sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in content.images}
            for entry, segmentation in zip(annotations, content.segmentations, strict=True):
                height, width = sizes[entry["image_id"]]
                entry["segmentation"] = to_coco(segmentation, height=height, width=width)
        return {
            "info": {"description": self.name},
            "images": [
                {key: entry[key] for key in ("id", "file_name", "height", "width")}
                for entry in content.images
            ],
            "annotations": annotations,
            "categories": [
                {"id": category, "name": name}
                for category, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }

    def _path(self, image: dict) -> str:
        return os.path.join(self._image_dir, image["file_name"])

    def _without_paths_outside(self, annotations: CocoAnnotations, report: Report) -> CocoAnnotations:
        folder = os.path.realpath(self._image_dir)
        faults, outside = [], set()
        for entry in annotations.images:
            try:
                inside = os.path.realpath(self._path(entry)).startswith(folder + os.sep)
            except (OSError, ValueError):  # No file system takes such a name.
                inside = False
            if not inside or os.path.isabs(entry["file_name"]) or ".." in entry["file_name"].split("/"):
                outside.add(entry["id"])
                faults.append(
                    Fault(
                        kind="path out of the image folder",
                        file=self.annotation_file,
                        record=f"file_name {shown(entry['file_name'])} of image {entry['id']}",
                        what=f"does not stay in the image folder {self._image_dir}",
                        remedy="Name files relative to the image folder, and keep them (not links) inside it.",
                    )
                )
        report(faults)
        return annotations.without(outside)

    def _without_unusable_images(self, annotations: CocoAnnotations, report: Report) -> CocoAnnotations:
        faults, unusable = [], set()
        for entry in annotations.images:
            try:
                check_image(self._path(entry), height=entry["height"], width=entry["width"])
            except DataError as error:
                unusable.add(entry["id"])
                faults.append(self.image_fault(entry["id"], error.fault))
        report(faults)
        return annotations.without(unusable)

    def image_fault(self, image_id: int, fault: Fault) -> Fault:
        """Returns a fault of an image file as one of its entry in the annotation file."""
        return dataclasses.replace(
            fault,
            file=self.annotation_file,
            record=f"image {image_id}",
            what=f"is unusable: {fault.file} {fault.what}",
        )

    def _make_records(self) -> tuple[Record, ...]:
        content = self._annotations
        dense = {category: index for index, category in enumerate(self.category_ids)}
        classes = np.array([dense[entry["category_id"]] for entry in content.annotations], np.int32)
        is_crowd = np.array([entry.get("iscrowd", 0) for entry in content.annotations], bool)
        rows_of: dict[int, list[int]] = {entry["id"]: [] for entry in content.images}
        for row, entry in enumerate(content.annotations):
            if content.has_extent[row]:
                rows_of[entry["image_id"]].append(row)
        records = []
        for entry in content.images:
            rows = rows_of[entry["id"]]
            index = np.array(rows, np.intp)
            masks = content.segmentations
            records.append(
                Record(
                    image_id=entry["id"],
                    file_name=self._path(entry),
                    height=entry["height"],
                    width=entry["width"],
                    boxes=content.boxes[index],
                    classes=classes[index],
                    is_crowd=is_crowd[index],
                    segmentations=None if masks is None else tuple(masks[row] for row in rows),
                )
            )
        return tuple(records)
