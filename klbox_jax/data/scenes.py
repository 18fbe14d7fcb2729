"""The embedded data set: painted scenes, prepared once by a tensorflow-datasets builder, and their source.

The training split holds only noisy boxes, as an annotator would draw them. Validation, calibration and test hold the
noisy and the exact boxes. Every split holds the true standard deviation of the label noise of every edge, so that a
learned variance can be compared with it. TensorFlow is not needed.
"""

import dataclasses
import hashlib
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from klbox_jax.data import scene_painter
from klbox_jax.data.masks import RunLengths, run_lengths, to_coco
from klbox_jax.data.record_files import RecordFiles
from klbox_jax.data.source import DataError, Record

SPLITS = ("train", "validation", "calibration", "test")
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesSettings:
    """Settings of a scenes data set; together with the painter's code they determine it completely.

    Attributes:
        seed: seed of the data set.
        image_size: height and width of an image, in pixels.
        train, validation, calibration, test: number of images in each split.
        noise_scale: factor on the standard deviations of the label noise. 0 makes the noisy boxes exact, 2
            doubles the noise; images and random draws are the same for every value.
    """

    seed: int = 0
    image_size: int = 192
    train: int = 4000
    validation: int = 500
    calibration: int = 500
    test: int = 500
    noise_scale: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "noise_scale", float(self.noise_scale))  # 1 and 1.0 give one fingerprint
        if self.image_size < 64:
            raise ValueError(f"image_size is {self.image_size}; scenes need 64 pixels or more.")
        if self.noise_scale < 0:
            raise ValueError(f"noise_scale is {self.noise_scale}; it must not be negative.")
        if self.seed < 0 or min(self.train, self.validation, self.calibration, self.test) < 1:
            raise ValueError("The seed must not be negative, and every split needs an image.")


def fingerprint(settings: ScenesSettings) -> str:
    """Returns the sha256 (hex) of the painter's source code and the settings, which identifies a data set."""
    digest = hashlib.sha256(Path(scene_painter.__file__).read_bytes())
    digest.update(repr((sorted(dataclasses.asdict(settings).items()), JPEG_QUALITY)).encode())
    return digest.hexdigest()


class ScenesConfig(tfds.core.BuilderConfig):
    """A builder config whose name contains the fingerprint, so that each data set has a folder of its own."""

    def __init__(self, settings: ScenesSettings):
        digest = fingerprint(settings)[:12]
        name = f"seed{settings.seed}_{settings.image_size}px_noise{settings.noise_scale:g}_{digest}"
        super().__init__(name=name, version=scene_painter.VERSION, description="Painted scenes.")
        self.settings = settings


class Scenes(tfds.core.GeneratorBasedBuilder):
    """The tensorflow-datasets builder of the painted scenes, with boxes of known label noise."""

    VERSION = tfds.core.Version(scene_painter.VERSION)
    url_infos = None  # nothing is downloaded; the inherited search needs a package that is not installed

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.settings.image_size
        edges = tfds.features.Tensor(shape=(None, 4), dtype=np.float32)
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg"),
            "instances": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
            "image_id": tfds.features.Scalar(dtype=np.int64),
            "classes": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "boxes": edges,  # no rows in the training split
            "boxes_noisy": edges,
            "box_stds": edges,
            "blur": edges,
            "edge_hidden": edges,
            "hidden": tfds.features.Tensor(shape=(None,), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Textured objects over textured ground, with occlusion, blur and known label noise.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # record i of a split is scene i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        settings = self.builder_config.settings
        count = getattr(settings, split)
        with ThreadPoolExecutor(2) as pool:  # painting a scene mostly runs outside the interpreter lock
            for start in range(0, count, 64):  # a bounded number of scenes in memory
                indices = range(start, min(start + 64, count))
                yield from zip(
                    indices, pool.map(lambda i: make_example(settings, split, i), indices), strict=True
                )


def make_example(settings: ScenesSettings, split: str, index: int) -> dict:
    """Returns scene `index` of a split in the builder's format; images are encoded."""
    number = SPLITS.index(split)
    scene = scene_painter.paint_scene((settings.seed, number, index), size=settings.image_size)
    image, instances = io.BytesIO(), io.BytesIO()
    Image.fromarray(scene.image).save(image, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    Image.fromarray(scene.instances).save(instances, "PNG")
    image.seek(0)
    instances.seek(0)
    return {
        "image": image,
        "instances": instances,
        "image_id": number * 1_000_000 + index + 1,
        "classes": scene.classes.astype(np.int64),
        "boxes": scene.boxes[: 0 if split == "train" else None],
        "boxes_noisy": scene_painter.noisy_boxes(scene, noise_scale=settings.noise_scale),
        "box_stds": np.float32(settings.noise_scale) * scene.box_stds,
        "blur": scene.blur,
        "edge_hidden": scene.edge_hidden,
        "hidden": scene.hidden,
    }


def prepare(data_dir: str | Path, *, settings: ScenesSettings | None = None) -> Scenes:
    """Prepares the data set under `data_dir` if it is not there, and returns its builder.

    The files are written to a temporary folder that is renamed at the end. So an interrupted preparation starts
    again, and of two at the same time the first one to finish is kept. The default settings take about a minute.

    Raises:
        DataError: the folder cannot be written.
    """
    config = ScenesConfig(settings or ScenesSettings())

    def builder() -> Scenes:
        return Scenes(data_dir=str(data_dir), config=config, file_format="array_record")

    if (found := builder()).is_prepared():
        return found
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        found.download_and_prepare()
    except OSError as error:
        if not (found := builder()).is_prepared():
            raise DataError(
                f"The scenes cannot be prepared in {data_dir} ({error.strerror or error}); free space on its disk, or "
                "set config.data.root to another folder."
            ) from error
    return found


class ScenesSource:
    """A split of the scenes as a `klbox_jax.data.source.Source`; prepares the data set if it is not there.

    Args:
        data_dir: the folder of prepared data sets.
        split: train, validation, calibration or test.
        boxes: "noisy" for the boxes as annotated, "exact" for the true extents (not in the training split).
            `box_stds` are those of the noisy boxes in both cases.
        masks: add segmentations, the visible pixels of each object, to the records and the ground truth. They are
            read from the instance maps at once, in less than a millisecond an image.
        settings: fields of `ScenesSettings`, such as `seed` and `noise_scale`.

    Attributes:
        settings: the complete settings.
        fingerprint: identifies the data set in result files.
        details: for each record a dictionary of arrays: `boxes` (exact; empty in the training split),
            `boxes_noisy`, `box_stds`, `blur` and `edge_hidden` [n, 4], `hidden` [n]; see `Scene`.

    Raises:
        ValueError: an unknown split or kind, or the exact boxes of the training split.
        DataError: the prepared files are damaged, or hold another number of scenes than the settings say.
    """

    class_names = scene_painter.CLASS_NAMES
    category_ids = tuple(range(1, len(scene_painter.CLASS_NAMES) + 1))

    def __init__(
        self, data_dir: str | Path, split: str, *, boxes: str, masks: bool = False, **settings: int | float
    ):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
        if boxes not in ("exact", "noisy"):
            raise ValueError(f"boxes is {boxes!r}; choose exact or noisy.")
        if split == "train" and boxes == "exact":
            raise ValueError("The training split has no exact boxes; use boxes='noisy' or another split.")
        self.name = f"scenes/{split}"
        self.settings = ScenesSettings(**settings)
        self.fingerprint = fingerprint(self.settings)
        builder = prepare(data_dir, settings=self.settings)
        undecoded = {"image": tfds.decode.SkipDecoding(), "instances": tfds.decode.SkipDecoding()}
        self._examples = builder.as_data_source(split, decoders=undecoded)
        if len(self._examples) != getattr(self.settings, split):
            raise DataError(
                f"{builder.data_dir} holds {len(self._examples)} scenes of {split}, not "
                f"{getattr(self.settings, split)}; delete the folder, and the next start prepares it again."
            )
        self._split, self._files = split, RecordFiles(builder)
        self._files.check(split)
        self.records, self.details = [], []
        for row in range(len(self._examples)):
            example = self._read(row)
            del example["image"]
            instances = example.pop("instances")
            kept = example["boxes" if boxes == "exact" else "boxes_noisy"]
            image_id, classes = int(example.pop("image_id")), example.pop("classes").astype(np.int32)
            self.records.append(
                Record(
                    image_id=image_id,
                    file_name=f"{builder.data_dir}/{split}/{image_id}",
                    height=self.settings.image_size,
                    width=self.settings.image_size,
                    boxes=kept,
                    classes=classes,
                    is_crowd=np.zeros(len(kept), bool),
                    box_stds=example["box_stds"],
                    segmentations=_segmentations(instances, len(kept)) if masks else None,
                )
            )
            self.details.append(example)

    def load_image(self, index: int) -> UInt8[ndarray, "h w 3"]:
        """Returns the RGB image of `records[index]`."""
        with Image.open(io.BytesIO(self._read(index)["image"])) as image:
            return np.asarray(image)

    def load_instances(self, index: int) -> UInt8[ndarray, "h w"]:
        """Returns the instance map: 0 for no object, i + 1 for row i of `records[index]`."""
        return _decode(self._read(index)["instances"])

    def _read(self, row: int) -> dict[str, Any]:
        return self._files.read(self._examples, row, (self._split, row + 1))

    def coco_ground_truth(self) -> dict:
        """Returns the COCO dictionary of this source's boxes (amodal; `area` is that of the box).

        It has the masks if the source was made with them. In addition to the fields of COCO, an annotation has
        `bbox_noisy`, the box as annotated, in the form of `bbox` (which is exact if `boxes="exact"`), and `bbox_std`,
        the true stds of its label noise (`x1, y1, x2, y2`, pixels).
        """
        annotations = []
        for record, detail in zip(self.records, self.details, strict=True):
            rows = (record.boxes, detail["boxes_noisy"], record.box_stds)
            rows = (row.astype(float).tolist() for row in rows)
            masks = [{} for _ in record.classes]
            if record.segmentations is not None:
                masks = [
                    {"segmentation": to_coco(mask, height=record.height, width=record.width)}
                    for mask in record.segmentations
                ]
            for (x1, y1, x2, y2), noisy, stds, class_index, mask in zip(
                *rows, record.classes, masks, strict=True
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record.image_id,
                        "category_id": self.category_ids[class_index],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "bbox_noisy": [*noisy[:2], noisy[2] - noisy[0], noisy[3] - noisy[1]],
                        "bbox_std": stds,
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                        **mask,
                    }
                )
        images = [
            {"id": r.image_id, "file_name": r.file_name, "width": r.width, "height": r.height}
            for r in self.records
        ]
        categories = [
            {"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}


def _decode(encoded: bytes) -> UInt8[ndarray, "h w"]:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image)


def _segmentations(encoded: bytes, num_objects: int) -> tuple[RunLengths, ...]:
    instances = _decode(encoded)
    return tuple(run_lengths(instances == index + 1) for index in range(num_objects))
