"""A trained detector for photographs: load the folder of a run, and call it on an image.

    detector = klbox_jax.load("runs/kl")
    found = detector("photo.jpg")
    found.boxes, found.box_stds, found.scores, found.names

The folder is that of a run, or a shipped one with `config.json`, `classes.json` and `model.safetensors`.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float, UInt8
from numpy import ndarray

from klbox_jax.compilation import CountedJit
from klbox_jax.data.build import build_preprocessing
from klbox_jax.data.source import DataError, Record
from klbox_jax.data.transforms import Placement, Preprocessing, choose_canvas, make_example, resized_size
from klbox_jax.errors import WorkdirError
from klbox_jax.evaluation.eval_step import eval_step
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.serving.images import read_image
from klbox_jax.serving.model_folder import read_classes, read_config, read_params
from klbox_jax.serving.prediction import Prediction
from klbox_jax.structures import Batch, Detections
from klbox_jax.train.calibration_file import load_temperature
from klbox_jax.train.extensions import Extensions
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir

# Fields of `config.data` that define the preprocessing of an image.
_DATA_FIELDS = ("short_side", "long_side", "canvases")
# Fields of the initial weights; they do not change the detector.
_START_FIELDS = ("model.init_weights", "model.init_partial")


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """A detector; call it on an image or on a list of images.

    Every image is placed on one of the canvases of the config, and each canvas is compiled once for single images and
    once for batches.

    Attributes:
        model: the detector.
        params: its parameters, on one device.
        preprocessing: sizes of the images.
        settings: the post-processing.
        class_names: names of all classes.
        category_ids: the data set's own id of each class.
        workdir: the folder it was loaded from, which may have a calibration of the stds.
        step: step of the checkpoint; None if a shipped file does not have it.
        calibrated: apply the calibration, if there is one.

    Raises:
        ValueError: the settings need an output that the detector does not have.
    """

    model: GeneralizedRCNN
    params: Any
    preprocessing: Preprocessing
    settings: PostprocessSettings
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    workdir: Workdir
    step: int | None
    calibrated: bool

    def __post_init__(self):
        heads = self.model.roi_heads
        self.settings.check_head(
            has_variances=heads.box_loss.has_variances, has_iou_head=heads.iou_head is not None
        )

    def __repr__(self) -> str:
        """Returns the folder, the step, the loss and the classes; the parameters are not shown."""
        names = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
        step = "" if self.step is None else f", step {self.step}"
        return (
            f"Predictor({str(self.workdir.path)!r}{step}, {self.model.roi_heads.box_loss.name}, "
            f"{len(self.class_names)} classes: {names})"
        )

    def __call__(self, images: Any, *, batch_size: int | None = None) -> Prediction | list[Prediction]:
        """Returns the objects in an image, or in each image of a list or tuple.

        Args:
            images: an image in one of the forms of `read_image`, or a list or tuple of them.
            batch_size: images of a list that the network takes at once; 8 by default, and 1 on a CPU, where larger
                batches are no faster. A rest that fills no batch is taken one by one.

        Raises:
            DataError: an image cannot be used; see `read_image`. A ValueError.
        """
        if not isinstance(images, list | tuple):
            return self._predict_one(images)
        if batch_size is None:
            batch_size = 1 if jax.default_backend() == "cpu" else 8
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        found: list[Prediction | None] = [None] * len(images)
        waiting: dict[tuple[int, ...], list[tuple[int, Batch]]] = {}
        for index, image in enumerate(images):
            try:
                batch = self.prepare(read_image(image))
            except DataError as error:
                raise DataError(f"image {index} of the list: {error}") from error
            group = waiting.setdefault(batch.images.shape, [])
            group.append((index, batch))
            if len(group) == batch_size:
                self._predict_group(group, images, found)
                group.clear()
        for group in waiting.values():
            for single in group:
                self._predict_group([single], images, found)
        return found

    def _predict_one(self, image: Any) -> Prediction:
        return dataclasses.replace(self.predict(self.prepare(read_image(image))), source=image)

    def _predict_group(
        self, group: list[tuple[int, Batch]], images: Sequence[Any], found: list[Prediction | None]
    ) -> None:
        """Predicts images of one canvas at once, and writes the results to their places in `found`."""
        batch = jax.tree.map(lambda *rows: np.concatenate(rows), *(batch for _, batch in group))
        for (index, _), prediction in zip(group, self.predict_batch(batch), strict=True):
            found[index] = dataclasses.replace(prediction, source=images[index])

    @functools.cached_property
    def temperature(self) -> Float[ndarray, "4"] | None:
        """Factors on the stds of `x1, y1, x2, y2`, or None; see `load_temperature`."""
        if not self.calibrated or self.step is None:
            return None
        return load_temperature(self.workdir, self.step, self.settings)

    def with_settings(self, **fields: Any) -> "Predictor":
        """Returns a predictor with the same parameters and other fields of `PostprocessSettings`."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **fields))

    def prepare(self, pixels: UInt8[ndarray, "h w 3"]) -> Batch:
        """Returns an RGB image on its canvas, as a batch of one, the same as in the evaluation."""
        height, width = pixels.shape[:2]
        record = Record(
            image_id=0,
            file_name="the image",
            height=height,
            width=width,
            boxes=np.zeros((0, 4), np.float32),
            classes=np.zeros(0, np.int32),
            is_crowd=np.zeros(0, bool),
        )
        canvas, new_size = _place(record, self.preprocessing)
        example = make_example(pixels, record, Placement(canvas=canvas, new_size=new_size), max_gt=1)
        return jax.tree.map(lambda leaf: leaf[None], example)

    def predict(self, batch: Batch) -> Prediction:
        """Returns the objects in a batch of `prepare`, which has one image."""
        return self.predict_batch(batch)[0]

    def predict_batch(self, batch: Batch) -> list[Prediction]:
        """Returns the objects in each image of a batch of several images on one canvas."""
        found = jax.device_get(self._step(self.params, batch))
        return [self._prediction_of(found, batch, row) for row in range(len(batch.images))]

    def _prediction_of(self, found: Detections, batch: Batch, row: int) -> Prediction:
        valid = found.valid[row]
        stds = None if found.box_stds is None else found.box_stds[row][valid]
        if stds is not None and self.temperature is not None:
            stds = stds * self.temperature[None].astype(np.float32)
        width, height = np.rint(batch.image_size[row, ::-1] / batch.scale[row]).astype(int).tolist()
        return Prediction(
            boxes=found.boxes[row][valid],
            scores=found.scores[row][valid],
            classes=found.classes[row][valid],
            class_names=self.class_names,
            category_ids=self.category_ids,
            box_stds=stds,
            masks=None if found.masks is None else found.masks[row][valid],
            image_size=(height, width),
        )

    @functools.cached_property
    def _step(self) -> CountedJit:
        def step(params, batch):
            return eval_step(params, batch, model=self.model, settings={"": self.settings})[""]

        return CountedJit(step)


def load(
    workdir: str | os.PathLike,
    *,
    step: int | None = None,
    settings: PostprocessSettings | None = None,
    calibrated: bool = True,
    extensions: Extensions | None = None,
) -> Predictor:
    """Returns the detector of a run's folder or of a shipped one.

    Args:
        workdir: a folder with `config.json`, and `checkpoints/` or `model.safetensors`. Nothing in it is changed.
        step: step of the checkpoint; by default the newest sound one.
        settings: the post-processing; by default that of the config.
        calibrated: multiply the stds of each edge by its temperature, if the folder has a calibration of this
            checkpoint under these settings.
        extensions: parts of the user's own that the run's config names.

    Raises:
        ValueError: the folder is not that of a run, its config does not describe a detector, its classes are not
            known, the weights do not fit, or the settings need an output that the detector does not have.
        CheckpointError: there is no such checkpoint, or it is not sound.
    """
    folder = Workdir(workdir)
    config = read_config(folder)
    class_names, category_ids = read_classes(folder, config)
    try:
        model = (extensions or Extensions()).build_model(config.model, num_classes=len(class_names))
        preprocessing = build_preprocessing(config.data)
        settings = settings or PostprocessSettings(**config.postprocess)
    except (AttributeError, KeyError, TypeError) as error:
        raise WorkdirError(
            f"{folder.config} does not describe a detector of this version of klbox_jax ({error})"
        ) from error
    step, params = read_params(folder, model, preprocessing.canvases[0], step)
    predictor = Predictor(
        model=model,
        params=jax.device_put(params, jax.local_devices()[0]),
        preprocessing=preprocessing,
        settings=settings,
        class_names=class_names,
        category_ids=category_ids,
        workdir=folder,
        step=step,
        calibrated=calibrated,
    )
    _ = predictor.temperature  # raises now if the file is damaged
    return predictor


def check_same_detector(job: Job, predictor: Predictor) -> None:
    """Raises ValueError that lists the differing fields if the config of a job describes another detector.

    The predictor is built from the config in its workdir, so a different `--config` would be ignored silently.
    """
    config = job.config
    model = job.extensions.build_model(config.model, num_classes=len(predictor.class_names))
    preprocessing = build_preprocessing(config.data)
    sides = [getattr(predictor.preprocessing, name) for name in _DATA_FIELDS]
    if model == predictor.model and sides == [getattr(preprocessing, name) for name in _DATA_FIELDS]:
        return
    stored, given = map(_detector_fields, (read_config(predictor.workdir), config))
    changes = [
        f"{name} is {given.get(name)!r} instead of {stored.get(name)!r}"
        for name in sorted(stored | given)
        if stored.get(name) != given.get(name) and name not in _START_FIELDS
    ]
    raise ValueError(
        f"--config describes another detector than the one in {predictor.workdir.path}: {', '.join(changes)}; give the "
        "--config that it was trained with"
    )


def _detector_fields(config: Any) -> dict[str, Any]:
    data = {name: config.data[name] for name in _DATA_FIELDS}
    return flatten_dict({"model": config.model.to_dict(), "data": data}, sep=".")


def _place(record: Record, preprocessing: Preprocessing) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the canvas of an image, and its size on the canvas.

    An image that fits no canvas, which is an error in a data set, is shrunk onto the canvas where it stays largest.
    """
    sides = {"short_side": preprocessing.short_side, "long_side": preprocessing.long_side}
    try:
        canvases = [preprocessing.canvases[choose_canvas(record, preprocessing)]]
    except DataError:
        canvases = preprocessing.canvases
    placed = [
        (resized_size(record.height, record.width, canvas=canvas, **sides), canvas) for canvas in canvases
    ]
    new_size, canvas = max(placed, key=lambda choice: choice[0][0] * choice[0][1])
    return canvas, new_size
