"""Reader of detection data sets in PASCAL VOC's XML format.

The layout is that of the VOC devkit, or one VOC folder alone (year ""), or a folder for each split:

    root/VOC{year}/ImageSets/Main/{split}.txt    root/ImageSets/Main/{split}.txt
    root/VOC{year}/Annotations/{name}.xml        root/Annotations/{name}.xml        root/{split}/{name}.xml
    root/VOC{year}/JPEGImages/{name}.jpg         root/JPEGImages/{name}.jpg         root/{split}/{name}.jpg

Images may have any suffix of a format that is read, in upper or lower case.

VOC's boxes name their first and last pixel, counted from 1. With continuous edges, where pixel `i` (from 0) covers
`[i, i + 1)`, the box `xmin, ymin, xmax, ymax` is `xmin - 1, ymin - 1, xmax, ymax`. Other tools, such as CVAT, write
the continuous edges themselves: `first_pixel=0` reads `xmin, ymin, xmax, ymax` unchanged.

Objects that VOC marks as difficult are ignored: training treats them as crowds (not as background), the evaluation
as described in `klbox_jax.evaluation.voc`.
"""

import os
from collections.abc import Sequence

from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.image import decode_image
from klbox_jax.data.image_files import ImageRules, find_image_fault, leads_outside, link_fault
from klbox_jax.data.source import DataError, Fault, FaultHandler, Record, coco_dictionary, raise_fault
from klbox_jax.data.voc_annotations import EdgeCounts, VocReader
from klbox_jax.data.voc_files import open_voc_folder

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VocSource:
    """Splits of a folder in VOC's layout, as `klbox_jax.data.source.Source`.

    Images are numbered from 1 in the order of the splits, categories from 1 in the order of the classes. Boxes
    are clipped to the image. A record's `is_crowd` marks the difficult objects.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]
    fingerprint: str | None = None

    def __init__(
        self,
        root: str | os.PathLike,
        splits: Sequence[tuple[str, str]],
        *,
        class_names: tuple[str, ...] = VOC_CLASSES,
        first_pixel: int = 1,
        images: ImageRules = ImageRules(),  # noqa: B008
        on_fault: FaultHandler = raise_fault,
    ):
        """Reads and checks every annotation, and the header and end of every image file.

        Args:
            root: the folder that holds VOC2007, VOC2012 and so on, or one such folder itself.
            splits: (year, split) pairs, e.g. `("2007", "trainval"), ("2012", "trainval")`; the year "" is the root.
            class_names: every class that the annotations may name.
            first_pixel: number of the first pixel of a row, 1 in VOC, and 0 in the files of many tools.
            images: rules for the image files.
            on_fault: receives the faults of single images; these images are left out.

        Raises:
            ValueError: `first_pixel` is neither 0 nor 1.
            DataError: the folder or its list of images is unusable, or (from `on_fault`) an image.
        """
        if first_pixel not in (0, 1):
            raise ValueError(
                f"config.data.voc_first_pixel = {first_pixel!r} is not 0 or 1; VOC's own files count from 1"
            )
        joined = "+".join(f"{year}_{split}" if year else split for year, split in splits)
        self.name = f"{os.path.basename(os.path.abspath(root))}/{joined}"
        self.class_names = tuple(class_names)
        self.category_ids = tuple(range(1, len(class_names) + 1))
        reader = VocReader(self.class_names, first_pixel)
        listed = [
            (folder, name)
            for folder in (open_voc_folder(root, year, split) for year, split in splits)
            for name in folder.names
        ]
        records, faults, seen = [], [], set()
        edges = EdgeCounts()
        for image_id, (folder, name) in enumerate(listed, start=1):
            annotation_file, path = folder.files_of(name)
            try:
                if path in seen:
                    raise DataError(_listed_twice(path, joined))
                seen.add(path)
                record, found = reader.read_record(annotation_file, path, image_id, edges)
                faults += found
                if leads_outside(path, folder.real_folders, images):
                    raise DataError(link_fault(path))
                fault = find_image_fault(path, height=record.height, width=record.width, rules=images)
                if fault is not None:
                    raise DataError(fault)
                if not found:
                    records.append(record)
            except DataError as error:
                faults.append(error.fault)
        on_fault(faults)
        if first_pixel == 1:
            on_fault(edges.faults(os.fspath(root), joined))
        self.records = tuple(records)

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        record = self.records[index]
        return decode_image(record.file_name, height=record.height, width=record.width)

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary of the records; each annotation has VOC's `difficult` in addition to `iscrowd`.

        COCO's protocol can ignore an object only as a crowd.
        """
        content = coco_dictionary(self)
        for annotation in content["annotations"]:
            annotation["difficult"] = annotation["iscrowd"]
        return content


def _listed_twice(path: str, split: str) -> Fault:
    return Fault(
        kind="duplicate id",
        file=path,
        what=f"is listed twice in {split}",
        remedy="Remove one of its lines.",
    )
