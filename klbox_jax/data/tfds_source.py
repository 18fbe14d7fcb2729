"""Reader of detection sets that tensorflow-datasets has prepared, by name and without TensorFlow.

tensorflow-datasets reads a prepared folder of ArrayRecord files without TensorFlow, but most of its builders need
TensorFlow to prepare one. So nothing is prepared here. Prepare a set once, on another machine if necessary, with

    tfds.builder("voc/2007", data_dir=..., file_format="array_record").download_and_prepare()

A prepared folder names the Python classes of its features, which are then imported: open only folders that you
trust.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.coco_entries import is_id
from klbox_jax.data.image import decode_image, stored_size
from klbox_jax.data.record_files import RecordFiles
from klbox_jax.data.source import DataError, Fault, FaultHandler, Record, coco_dictionary, raise_fault

# Features of an object that exclude it from training, if the set has them.
_IGNORED = ("is_crowd", "is_difficult")


class TfdsSource:
    """A split of a prepared set as `klbox_jax.data.source.Source`.

    The set must have the features `image` and `objects`, with `bbox` (`ymin, xmin, ymax, xmax` as fractions of the
    image) and `label`; `is_crowd` and `is_difficult` of `objects`, and `image/id`, are used if they exist.
    `coco/2017`, `voc/2007` and `voc/2012` are such sets. There are no masks.

    Categories are numbered from 1 in the order of the labels, because the set does not hold the original ids. Without
    an integer `image/id` the images are numbered from 1. An image's `file_name` is the prepared split with its id, or
    with its number in that split, and so the same in every slice. A record's `is_crowd` marks crowds and difficult
    objects.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Sequence[Record]
    fingerprint: str | None = None

    def __init__(
        self, name: str, split: str, *, data_dir: str | os.PathLike, on_fault: FaultHandler = raise_fault
    ):
        """Reads the split once, for its annotations and the sizes of its images; no image is decoded.

        Args:
            name: name of the set, with its config and version if it has several: `voc/2007`, `voc/2007:5.0.0`.
            split: e.g. `train`, or a slice such as `train[:80%]`.
            data_dir: the folder of the prepared sets.
            on_fault: receives the faults of single images; these images are left out.

        Raises:
            DataError: the set is not prepared there as ArrayRecord, has no such split or features, a file of it is
                damaged, or (from `on_fault`) an image or an object is unusable.
        """
        self.name = f"{name}/{split}"
        folder = _prepared_folder(name, Path(data_dir))
        builder = tfds.builder_from_directory(folder)
        fields = _object_features(builder, folder)
        self.class_names = tuple(fields["label"].names)
        self.category_ids = tuple(range(1, len(self.class_names) + 1))
        features = builder.info.features.items()
        has_ids = any(
            key == "image/id" and np.issubdtype(feature.np_dtype, np.integer) for key, feature in features
        )
        decoders = {
            key: tfds.decode.SkipDecoding()
            for key, feature in features
            if isinstance(feature, tfds.features.Image)
        }
        self._places = _places(builder, split, folder)
        try:
            self._examples = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise DataError(
                f"{folder} is prepared in the format {builder.info.file_format.value}, which has no random access. "
                f"Prepare {name} again in another folder with file_format='array_record'."
            ) from error
        except ValueError as error:
            raise _split_error(folder, split, str(error)) from error
        self._files = RecordFiles(builder)
        for part in dict.fromkeys(part for part, _ in self._places):
            self._files.check(part)
        records, faults, rows = [], [], []
        for row, (part, number) in enumerate(self._places):
            try:
                example = self._files.read(self._examples, row, (part, number))
                image_id = int(example["image/id"]) if has_ids else row + 1
                file_name = f"{folder}/{part}/{image_id if has_ids else number}"
                records.append(self._make_record(example, image_id, file_name))
                rows.append(row)
            except DataError as error:
                faults.append(error.fault)
        on_fault(faults)
        self.records, self._rows = tuple(records), tuple(rows)
        ids = {record.image_id for record in self.records}
        if len(ids) < len(self.records) or not all(map(is_id, ids)):
            raise DataError(
                f"{folder}: the 'image/id' of {split} are not unique integers of at most 53 bits. Prepare the set with "
                "others."
            )

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the decoded RGB image of `records[index]`; raises DataError."""
        record, row = self.records[index], self._rows[index]
        return decode_image(
            self._files.read(self._examples, row, self._places[row])["image"],
            height=record.height,
            width=record.width,
            name=record.file_name,
        )

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary of the records."""
        return coco_dictionary(self)

    def _make_record(self, example: dict[str, Any], image_id: int, file_name: str) -> Record:
        height, width = stored_size(example["image"], file_name)
        objects = example["objects"]
        y1, x1, y2, x2 = np.asarray(objects["bbox"], np.float64).reshape(-1, 4).T
        corners = np.stack([x1 * width, y1 * height, x2 * width, y2 * height], axis=1)
        boxes = np.clip(corners, 0, [width, height, width, height]).astype(np.float32)
        is_fault = ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # also where an edge is NaN
        if is_fault.any():
            raise _error(
                file_name,
                "empty box",
                f"object {int(is_fault.argmax()) + 1} of the image",
                f"has a box without width or height inside it ({corners[is_fault][0].tolist()})",
                "Correct the set's origin, and prepare it again.",
            )
        classes = np.asarray(objects["label"], np.int32).reshape(-1)
        if ((classes < 0) | (classes >= len(self.class_names))).any():
            raise _error(
                file_name, "missing field", "an object", "has no label", "Use a split that is annotated."
            )
        is_crowd = np.zeros(len(boxes), bool)
        for key in set(_IGNORED) & set(objects):
            is_crowd |= np.asarray(objects[key], bool).reshape(-1)
        return Record(
            image_id=image_id,
            file_name=file_name,
            height=height,
            width=width,
            boxes=boxes,
            classes=classes,
            is_crowd=is_crowd,
        )


def _places(builder: Any, split: str, folder: Path) -> list[tuple[str, int]]:
    """Returns the prepared split of each example of `split`, and the number of the example in it, from 1.

    Raises:
        DataError: there is no such split, the slice is malformed, or a part of it is empty.
    """
    splits = builder.info.splits
    places = []
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except (ValueError, KeyError, AssertionError) as error:
        raise _split_error(folder, split, str(error)) from error
    for part in parts:
        total = splits[part.splitname].num_examples
        start, end = part.from_ or 0, total if part.to is None else part.to
        if start >= end:
            raise DataError(
                f"{folder}: the slice {split!r} is empty: {part.splitname} has {total} examples, of which it selects "
                f"{start} to {end}. Choose a larger slice."
            )
        places += [(part.splitname, row + 1) for row in range(start, end)]
    return places


def _split_error(folder: Path, split: str, reason: str) -> DataError:
    """Returns the error of a split that tensorflow-datasets refuses, with its reason."""
    reason = " ".join(reason.split())[:200]
    splits = _split_names(folder)
    unknown = [part for part in split.split("+") if part.partition("[")[0] not in (*splits, "all")]
    if unknown:
        return DataError(f"{folder} has no split {unknown[0]!r}; it has {', '.join(splits)}.")
    return DataError(
        f"{folder}: the slice {split!r} cannot be read: {reason}. Write a slice such as train[:80%] or train[100:]."
    )


def _split_names(folder: Path) -> list[str]:
    return list(tfds.builder_from_directory(folder).info.splits)


def _error(file: str, kind: str, record: str, what: str, remedy: str) -> DataError:
    return DataError(Fault(kind=kind, file=file, record=record, what=what, remedy=remedy))


def _prepared_folder(name: str, data_dir: Path) -> Path:
    """Returns the folder of a prepared set's newest version; raises DataError."""
    folder = data_dir.expanduser() / name.replace(":", "/")
    advice = (
        f"Prepare it there: tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
        ".download_and_prepare()"
    )
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: {name} is not prepared. {advice}.")
    if not (folder / "features.json").is_file():
        versions = [
            version for version in _versions(folder) if (folder / version / "features.json").is_file()
        ]
        if not versions:
            inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "nothing"
            raise DataError(
                f"{folder} holds no prepared version of {name}, but {inside}. If these are its configs, add one to "
                f"the name. {advice}."
            )
        folder = folder / versions[-1]
    return folder


def _versions(folder: Path) -> list[str]:
    return [str(version) for version in tfds.core.utils.version.list_all_versions(folder)]


def _object_features(builder: Any, folder: Path) -> dict[str, Any]:
    """Returns the features of an object by name; raises DataError if the set is not one for detection."""
    features = dict(builder.info.features.items())
    objects = getattr(features.get("objects"), "feature", None)
    fields = dict(objects.items()) if isinstance(objects, tfds.features.FeaturesDict) else {}
    if not isinstance(features.get("image"), tfds.features.Image) or not {"bbox", "label"} <= fields.keys():
        raise DataError(
            f"{folder} has the features {', '.join(sorted(features))}, but not 'image' and 'objects' with 'bbox' and "
            "'label'. Choose a set for detection."
        )
    if not getattr(fields["label"], "names", None):
        raise DataError(f"{folder} does not name its classes. Choose a set whose labels have names.")
    return fields
