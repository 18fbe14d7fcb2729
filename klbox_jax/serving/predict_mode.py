"""`klbox predict`: runs a trained detector on photographs.

    klbox predict runs/kl photos/

writes into `config.predict.output`, by default `predict` in the workdir:

    detections.json   a COCO data set of the objects, with the `bbox_std` of each box, and the files that failed
    pictures/         the images with boxes and bands of their stds
    index.html        a page of the pictures
"""

import collections
import contextlib
import dataclasses
import functools
import glob
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.config.paths import local_path
from klbox_jax.data.source import DataError
from klbox_jax.errors import Preempted
from klbox_jax.files import write_atomically, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.report.pictures import LabeledBoxes, draw_detections, save_picture, shrink
from klbox_jax.serving.gallery import Entry, render
from klbox_jax.serving.images import read_image
from klbox_jax.serving.prediction import Prediction
from klbox_jax.serving.predictor import Predictor, check_same_detector, load
from klbox_jax.structures import Batch
from klbox_jax.train.job import Job
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.writer import Progress

# Suffixes of the formats that are read; a file given by name or by a glob may have another one.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".webp", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Longest side of a drawn picture; larger images are shrunk.
PICTURE_SIDE = 1600


def predict(
    job: Job, inputs: Sequence[str] = (), *, step: int | None = None, preemption: Preemption | None = None
) -> pathlib.Path:
    """Finds objects in images, and writes them.

    An image that cannot be read is reported and left out.

    Args:
        job: the run. Its config has the post-processing, `predict`, and the number of reader threads, which is also
            the number of drawing threads.
        inputs: images, folders (with their sub-folders) or globs; by default `config.predict.input`.
        step: step of the checkpoint; by default the newest sound one.
        preemption: source of stop signals; None ignores signals.

    Returns:
        The folder of the results.

    Raises:
        ValueError: there are no images, or none that can be read; the folder of the results cannot be written;
            the config describes another detector than that of the workdir; or see `load`.
        CheckpointError: there is no sound checkpoint.
        Preempted: a signal stopped it; the results so far are written.
    """
    preemption = preemption or Preemption()
    fields = job.config.predict
    paths = find_images(*(inputs or [fields.input]))
    settings = PostprocessSettings(**job.config.postprocess)
    predictor = load(job.workdir.path, step=step, settings=settings, extensions=job.extensions)
    check_same_detector(job, predictor)
    output = pathlib.Path(fields.output or job.workdir.path / "predict")
    clock = _Clock()
    try:
        (output / "pictures").mkdir(parents=True, exist_ok=True)
        found, failed = _predict_all(predictor, paths, job, preemption, output=output, clock=clock)
        write_json(output / "detections.json", _to_coco(found, failed, job=job, predictor=predictor))
        entries = [
            Entry(each.name, each.picture, _counts(each.prediction, fields.score_threshold)) for each in found
        ]
        title = f"Detections of {job.workdir.path.name}"
        page = render(entries, title=title, failed=failed, score_threshold=fields.score_threshold)
        write_atomically(output / "index.html", page)
    except OSError as error:
        raise ValueError(
            f"config.predict.output = {str(output)!r} cannot be written ({error.strerror or error}); free space on "
            "its disk, or choose another"
        ) from error
    logging.info("%s: %d images, %d failed; %s", output, len(found), len(failed), clock)
    if number := preemption.signal():
        raise Preempted(number, f"{len(found) + len(failed)} of {len(paths)} images are in {output}")
    if not found:
        name, reason = next(iter(failed.items()))
        raise DataError(f"none of the {len(failed)} images can be read; {name}: {reason}")
    return output


def find_images(*given: str) -> dict[pathlib.Path, str]:
    """Returns the image files of paths, folders (with their sub-folders) and globs, each with the name to show.

    Files in folders and matches of globs that have no suffix of an image are passed over; the log counts them. `**` in
    a glob stands for any number of folders. Files and folders whose names begin with a dot are not looked at.

    Raises:
        ValueError: one of them has no image.
    """
    found: dict[pathlib.Path, str] = {}
    for text in given:
        if not text:
            raise ValueError(
                "no images are given; name an image, a folder of images or a glob (config.predict.input)"
            )
        found |= {path: name for path, name in _find_images(text).items() if path not in found}
    return found


def _find_images(given: str) -> dict[pathlib.Path, str]:
    path = pathlib.Path(local_path(given, "config.predict.input"))
    if path.is_file():
        return {path: path.name}
    if path.is_dir():
        files = _files_below(path)
        names, place = {file: os.fspath(file.relative_to(path)) for file in files}, f"the folder {given}"
    elif glob.has_magic(given):
        files = sorted(map(pathlib.Path, glob.glob(os.fspath(path), recursive=True)))
        names, place = {file: os.fspath(file) for file in files if file.is_file()}, f"the matches of {given}"
    else:
        raise ValueError(f"config.predict.input = {given!r}: there is no such file or folder")
    images = {
        file: name for file, name in names.items() if file.suffix.lower() in SUFFIXES and file.is_file()
    }
    others = collections.Counter(file.suffix.lower() or "no suffix" for file in names if file not in images)
    if others:
        logging.info(
            "%s: %d images; passed over %d other files (%s)",
            *(
                place,
                len(images),
                others.total(),
                ", ".join(f"{count} of {s}" for s, count in others.most_common()),
            ),
        )
    if not images:
        raise ValueError(
            f"config.predict.input: there is no image in {place}; names of images end in {', '.join(SUFFIXES)}"
        )
    return images


def _files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        # Changed in place, which is how a walk leaves folders out.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class _Found:
    """The objects in one image; `number` counts from 1, `picture` is its path relative to the output, or None."""

    number: int
    name: str
    picture: str | None
    prediction: Prediction


def _predict_all(
    predictor: Predictor,
    paths: Mapping[pathlib.Path, str],
    job: Job,
    preemption: Preemption,
    *,
    output: pathlib.Path,
    clock: "_Clock",
) -> tuple[list[_Found], dict[str, str]]:
    """Returns the objects in all images, and the reason for each image that failed, by name.

    Threads read images ahead of the network, and others draw the pictures.
    """
    fields = job.config.predict
    num_pictures = fields.max_pictures if fields.draw else 0
    threads = max(1, job.config.data.num_threads)
    found, failed = [], {}
    with (
        ThreadPoolExecutor(threads) as readers,
        ThreadPoolExecutor(threads) as painters,
        Progress(len(paths), description="predict") as progress,
    ):
        read = functools.partial(_read, predictor)
        tasks = [(path, number <= num_pictures) for number, path in enumerate(paths, start=1)]
        readings = _ahead(readers, read, tasks, count=threads + 2)
        painting: collections.deque[Future] = collections.deque()
        for number, ((path, name), reading) in enumerate(zip(paths.items(), readings, strict=True), start=1):
            if preemption.signal():
                break
            progress.update(number - 1)
            try:
                batch, canvas = reading.result()
            except DataError as error:
                reason = " ".join(str(error).split())
                failed[name] = reason.removeprefix(f"{path} ")
                logging.warning("%s is left out: %s", name, failed[name])
                continue
            with clock.network(batch.images.shape, progress):
                prediction = predictor.predict(batch)
            picture = None
            if canvas is not None:
                picture = f"pictures/{number:05d}.jpg"
                threshold = float(fields.score_threshold)
                painting.append(painters.submit(_paint, output / picture, canvas, prediction, threshold))
            # Pictures that wait to be drawn hold memory.
            if len(painting) > 2 * threads:
                painting.popleft().result()
            found.append(_Found(number, name, picture, prediction))
        for last in painting:
            last.result()
        progress.update(len(found) + len(failed))
    return found, failed


def _read(
    predictor: Predictor, task: tuple[pathlib.Path, bool]
) -> tuple[Batch, UInt8[ndarray, "h w 3"] | None]:
    """Returns an image as a batch, and shrunk for drawing; runs in a reader thread."""
    path, is_drawn = task
    pixels = read_image(path)
    return predictor.prepare(pixels), shrink(pixels, long_side=PICTURE_SIDE) if is_drawn else None


def _ahead(
    executor: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], *, count: int
) -> Iterator[Future]:
    """Yields the future of each item in order, while the next `count` are being computed."""
    futures: collections.deque[Future] = collections.deque()
    for item in items:
        futures.append(executor.submit(function, item))
        if len(futures) > count:
            yield futures.popleft()
    yield from futures


def _paint(
    path: pathlib.Path, picture: UInt8[ndarray, "h w 3"], prediction: Prediction, score_threshold: float
) -> None:
    """Draws and writes a picture; runs in a drawing thread."""
    height, width = prediction.image_size
    scale = np.tile([picture.shape[1] / width, picture.shape[0] / height], 2)[None]
    shown = prediction.scores >= score_threshold
    stds = prediction.box_stds
    drawn = draw_detections(
        picture,
        LabeledBoxes(
            boxes=prediction.boxes[shown] * scale,
            labels=[prediction.class_names[index] for index in prediction.classes[shown]],
            scores=prediction.scores[shown],
            stds=None if stds is None else stds[shown] * scale,
        ),
        class_names=prediction.class_names,
    )
    save_picture(path, drawn)


def _to_coco(
    found: Sequence[_Found], failed: Mapping[str, str], *, job: Job, predictor: Predictor
) -> dict[str, Any]:
    """Returns a COCO data set; its annotations also have the fields of COCO results."""
    images, annotations = [], []
    for each in found:
        height, width = each.prediction.image_size
        images.append({"id": each.number, "file_name": each.name, "height": height, "width": width})
        for entry in each.prediction.to_coco(each.number):
            area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append({"id": len(annotations) + 1, "area": area, "iscrowd": 0, **entry})
    return {
        "info": {
            "description": f"detections of {job.workdir.path.name}",
            "step": predictor.step,
            "postprocess": predictor.settings.to_dict(),
            "temperature": predictor.temperature,
        },
        "images": images,
        "categories": [
            {"id": category, "name": name}
            for category, name in zip(predictor.category_ids, predictor.class_names, strict=True)
        ],
        "annotations": annotations,
        "failed": [{"file_name": name, "reason": reason} for name, reason in failed.items()],
    }


def _counts(prediction: Prediction, score_threshold: int | float) -> dict[str, int]:
    names = (prediction.class_names[i] for i in prediction.classes[prediction.scores >= score_threshold])
    return dict(collections.Counter(names).most_common())


class _Clock:
    """Measures the time of the network; the first image of each canvas counts as time of the compiler."""

    def __init__(self):
        self._started = time.perf_counter()
        self._compiled: set[tuple[int, ...]] = set()
        self._seconds = {"network": 0.0, "compiler": 0.0}

    @contextlib.contextmanager
    def network(self, shape: tuple[int, ...], progress: Progress) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if shape in self._compiled:
            self._seconds["network"] += seconds
        else:
            self._seconds["compiler"] += seconds
            self._compiled.add(shape)
            progress.leave_out(seconds)

    def __str__(self) -> str:
        total = time.perf_counter() - self._started - self._seconds["compiler"]
        share = 100.0 * self._seconds["network"] / total
        return (
            f"network {share:.0f} % of {total:.1f} s, after {self._seconds['compiler']:.1f} s for the first image of "
            f"each of {len(self._compiled)} canvases"
        )
