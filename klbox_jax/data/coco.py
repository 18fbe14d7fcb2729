"""Reader of detection data sets in COCO's JSON format.

By default the layout is that of COCO:

    root/annotations/instances_{split}.json
    root/{split}/<file_name of each image>

The whole annotation file is checked before training (`klbox_jax.data.coco_annotations`), and so is every image file.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.coco_annotations import CocoAnnotations, read_coco_annotations
from klbox_jax.data.image import decode_image
from klbox_jax.data.image_files import ImageRules, find_image_fault, leads_outside, real_folders
from klbox_jax.data.masks import to_coco
from klbox_jax.data.source import DataError, Fault, FaultHandler, Record, raise_fault, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoFiles:
    """The files of a split.

    Attributes:
        annotation_file: path, absolute or relative to the root; by default `annotations/instances_{split}.json`.
        image_dir: path, absolute or relative to the root; by default `{split}`.
        images: rules for the image files.
    """

    annotation_file: str = ""
    image_dir: str = ""
    images: ImageRules = ImageRules()  # noqa: RUF009


class CocoSource:
    """A split of a COCO data set, as `klbox_jax.data.source.Source`.

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
        masks: bool = False,
        skip_empty_boxes: bool = False,
        files: CocoFiles = CocoFiles(),  # noqa: B008
        on_fault: FaultHandler = raise_fault,
    ):
        """Reads and checks the annotations, and the header and end of every image file.

        Args:
            root: the folder of the data set.
            split: e.g. `train2017`.
            masks: read the masks too; every annotation must have one.
            skip_empty_boxes: leave boxes of no width or height out of the records, with a warning, instead of
                refusing them; the evaluation keeps them.
            files: paths of the annotations and the images, and the rules for image files.
            on_fault: receives the faults of single images and annotations; these images are left out.

        Raises:
            DataError: the folder or its annotation file is unusable, or (from `on_fault`) an image.
        """
        self.name = f"{os.path.basename(os.path.abspath(root))}/{split}"
        self.annotation_file = os.path.join(
            root, files.annotation_file or f"annotations/instances_{split}.json"
        )
        self._root, self._image_dir = os.fspath(root), os.path.join(root, files.image_dir or split)
        self._image_rules = files.images
        for folder in (self._root, self._image_dir):
            if not os.path.isdir(folder):
                raise DataError(f"{folder} is not a folder. Check the path of the data set and the split.")
        annotations = read_coco_annotations(
            self.annotation_file, masks=masks, skip_empty_boxes=skip_empty_boxes, on_fault=on_fault
        )
        annotations = self._without_paths_outside(annotations, on_fault)
        annotations = self._without_unusable_images(annotations, on_fault)
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

        It has the masks if the source was made with them. If an annotation has the id 0, all are renumbered from 1,
        because pycocotools counts a match with id 0 as no match.
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

    def _without_paths_outside(self, annotations: CocoAnnotations, on_fault: FaultHandler) -> CocoAnnotations:
        faults, outside = [], set()
        folders = real_folders(self._image_dir, self._root)
        for entry in annotations.images:
            name = entry["file_name"]
            has_way_out = os.path.isabs(name) or ".." in name.split("/") or os.path.normpath(name) == "."
            if not has_way_out and not leads_outside(self._path(entry), folders, self._image_rules):
                continue
            outside.add(entry["id"])
            is_link = not has_way_out and os.path.exists(self._path(entry))
            remedy = "Name files relative to the image folder, and keep them inside it"
            more = ", or set config.data.allow_links = True if you trust its links." if is_link else "."
            faults.append(
                Fault(
                    kind="path out of the image folder",
                    file=self.annotation_file,
                    record=f"file_name {shown(name)} of image {entry['id']}",
                    what=f"does not stay in the image folder {self._image_dir}",
                    remedy=remedy + more,
                )
            )
        on_fault(faults)
        return annotations.without(outside)

    def _without_unusable_images(
        self, annotations: CocoAnnotations, on_fault: FaultHandler
    ) -> CocoAnnotations:
        faults, unusable = [], set()
        for entry in annotations.images:
            size = {"height": entry["height"], "width": entry["width"]}
            fault = find_image_fault(self._path(entry), **size, rules=self._image_rules)
            if fault is not None:
                unusable.add(entry["id"])
                faults.append(self.image_fault(entry["id"], fault))
        on_fault(faults)
        return annotations.without(unusable)

    def image_fault(self, image_id: int, fault: Fault) -> Fault:
        """Returns a fault of an image file as a fault of the image's entry in the annotation file."""
        is_missing = fault.kind == "missing image"
        return dataclasses.replace(
            fault,
            remedy="Restore the image or remove its annotation entry." if is_missing else fault.remedy,
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
