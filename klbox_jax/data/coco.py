"""Reads detection data sets in COCO's JSON format.

The layout is that of COCO itself:

    root/annotations/instances_{split}.json
    root/{split}/<file_name of each image>

The whole annotation file is checked before anything is trained on it (`klbox_jax.data.coco_annotations`), and so
is every image file.
"""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.coco_annotations import read_coco_annotations
from klbox_jax.data.image import check_image, decode_image
from klbox_jax.data.masks import to_coco
from klbox_jax.data.source import DataError, Record, refuse, shown


class CocoSource:
    """A folder in COCO's layout, as `klbox_jax.data.source.Source`.

    Classes are numbered densely in the order of their category ids. Images without objects are kept. Boxes
    are clipped to the image; those of no width or no height are left out.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        annotation_file: str | os.PathLike | None = None,
        image_dir: str | os.PathLike | None = None,
        masks: bool = False,
        skip_empty_boxes: bool = False,
        check_images: bool = True,
    ):
        """Reads and checks the annotations, and the header and end of every image file.

        Args:
            root: the data set's folder.
            split: e.g. `train2017`.
            annotation_file: relative to `root`; by default `annotations/instances_{split}.json`.
            image_dir: relative to `root`; by default `{split}`.
            masks: read the objects' masks too; every annotation must have one.
            skip_empty_boxes: leave boxes of no width or height out of the records, with a warning, instead of
                refusing them; the evaluation keeps them.
            check_images: look at every image file now (0.1 ms each), not only when it is read.

        Raises:
            DataError: the folder, its annotations or its images are unusable.
        """
        self.name = f"{os.path.basename(os.path.abspath(root))}/{split}"
        self._file = os.path.join(root, annotation_file or f"annotations/instances_{split}.json")
        self._image_dir = os.path.join(root, image_dir or split)
        for folder in (os.fspath(root), self._image_dir):
            if not os.path.isdir(folder):
                raise DataError(f"{folder} is not a folder. Check the path of the data set and the split.")
        annotations = read_coco_annotations(self._file, masks=masks, skip_empty_boxes=skip_empty_boxes)
        self.category_ids = tuple(category["id"] for category in annotations.categories)
        self.class_names = tuple(category["name"] for category in annotations.categories)
        self._annotations = annotations
        self._paths = self._image_paths()
        self.records = self._make_records()
        if check_images:
            self._check_image_files()

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        record = self.records[index]
        return decode_image(self._paths[index], height=record.height, width=record.width)

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

    def _image_paths(self) -> list[str]:
        folder = os.path.realpath(self._image_dir)
        paths, faults = [], []
        for entry in self._annotations.images:
            path = os.path.join(self._image_dir, entry["file_name"])
            try:
                inside = os.path.realpath(path).startswith(folder + os.sep)
            except (OSError, ValueError):  # No file system takes such a name.
                inside = False
            if not inside or os.path.isabs(entry["file_name"]) or ".." in entry["file_name"].split("/"):
                faults.append(
                    f"file_name {shown(entry['file_name'])} of image {entry['id']} does not stay in the "
                    f"image folder {self._image_dir}"
                )
            paths.append(path)
        refuse(
            self._file,
            faults,
            "Name files relative to the image folder, and keep them (not links) inside it.",
        )
        return paths

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
        for entry, path in zip(content.images, self._paths, strict=True):
            rows = rows_of[entry["id"]]
            index = np.array(rows, np.intp)
            masks = content.segmentations
            records.append(
                Record(
                    image_id=entry["id"],
                    file_name=path,
                    height=entry["height"],
                    width=entry["width"],
                    boxes=content.boxes[index],
                    classes=classes[index],
                    is_crowd=is_crowd[index],
                    segmentations=None if masks is None else tuple(masks[row] for row in rows),
                )
            )
        return tuple(records)

    def _check_image_files(self) -> None:
        faults = []
        for record, path in zip(self.records, self._paths, strict=True):
            try:
                check_image(path, height=record.height, width=record.width)
            except DataError as error:
                faults.append(f"image {record.image_id} is unusable: {error}")
        if faults:
            more = f" ({len(faults) - 1} more images are unusable.)" if len(faults) > 1 else ""
            raise DataError(f"{self._file}: {faults[0]}{more}")
