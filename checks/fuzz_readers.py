"""Writes damaged files, reads them like the package does, and returns the outcome of each."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator

import numpy as np

from checks.fuzz_seeds import SEEDS, SIZE, mutate
from klbox_jax.data.coco import CocoFiles, CocoSource
from klbox_jax.data.image import check_image, decode_image
from klbox_jax.data.image_files import ImageRules
from klbox_jax.data.masks import rasterize, to_compressed_rle
from klbox_jax.data.source import DataError, raise_fault
from klbox_jax.data.voc import VocSource
from klbox_jax.weights.detectron_file import read_detectron_file
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.safetensors_file import load_params
from klbox_jax.weights.torch_file import read_torch_file

SECONDS = 5.0
# Beginnings of the names of audit events that reading a file must not cause.
EVENTS = (
    "exec", "compile", "ctypes", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename",
    "os.spawn", "os.startfile", "pty.", "shutil.", "socket.", "subprocess.", "urllib.", "webbrowser.",
)  # fmt: skip
KINDS = tuple(SEEDS)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a case."""

    kind: str  # kind and index: the case
    index: int
    name: str  # of the sound file that it was made from; empty where the worker cannot tell any more
    verdict: str  # "read", "refused", "crash" or "hang"
    text: str = ""  # the message, or the traceback

    @property
    def group(self) -> str:
        """The group of the shares: each layout of weights, and each other kind."""
        return f"{self.kind}/{self.name}" if self.kind == "weights" else self.kind


class _TooSlowError(BaseException):
    """Passes through every `except Exception` of a reader."""


def read_file(kind: str, path: pathlib.Path, rng: np.random.Generator) -> None:
    """Reads a file like the package does."""
    if kind == "coco":
        on_fault = raise_fault if rng.random() < 0.5 else [].extend
        files = CocoFiles(images=ImageRules(check=False))
        source = CocoSource(path.parents[1], "train", masks=True, files=files, on_fault=on_fault)
        for record in source.records:
            for box, segmentation in zip(record.boxes, record.segmentations, strict=True):
                rasterize(segmentation, box, mask_size=28, height=record.height)
        truth = source.coco_ground_truth()
        sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        for entry in truth["annotations"]:
            height, width = sizes[entry["image_id"]]
            to_compressed_rle(entry["segmentation"], height=height, width=width)
    elif kind == "voc":
        VocSource(path.parents[2], (("2007", "train"),), images=ImageRules(check=False)).coco_ground_truth()
    elif kind == "images":
        check_image(path, height=SIZE[0], width=SIZE[1])
        decode_image(path, height=SIZE[0], width=SIZE[1])
    elif path.suffix == ".safetensors":
        load_params(path)
    elif path.suffix == ".pkl":
        read_detectron_file(path)
    else:
        read_torch_file(path)


def make_case(kind: str, index: int, seed: int) -> tuple[str, bytes, np.random.Generator]:
    """Returns the name of the seed file of a case, the damaged file, and the generator for what follows."""
    rng = np.random.default_rng((seed, KINDS.index(kind), index))
    seeds = seeds_of(kind)
    name = list(seeds)[int(rng.integers(len(seeds)))]
    return name, mutate(kind, name, seeds, rng), rng


@functools.cache
def seeds_of(kind: str) -> dict[str, bytes]:
    """Returns the sound files of a kind by name."""
    return SEEDS[kind]()


class Readers:
    """Writes cases to a folder of their own and reads them; a context manager."""

    def __init__(self, *, watch: bool):
        """Makes the folder. With `watch`, any action besides reading counts as a crash, for the rest of the process."""
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz_")
        root = pathlib.Path(self._folder.name)
        for folder in ("annotations", "train", "VOC2007/ImageSets/Main", "VOC2007/Annotations"):
            (root / folder).mkdir(parents=True)
        (root / "VOC2007/ImageSets/Main/train.txt").write_text("1\n")
        self._root = root
        self._is_reading = False
        self._events: list[str] = []
        if watch:
            sys.addaudithook(self._audit)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *exception) -> None:
        self._folder.cleanup()

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self._is_reading:
            return
        if event == "open":
            _, mode, open_flags = arguments
            written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (open_flags or 0) & written:
                self._events.append(f"open {arguments}")
        elif event.startswith(EVENTS):
            self._events.append(f"{event} {arguments}"[:500])

    def path(self, kind: str, name: str) -> pathlib.Path:
        """Returns the path of a case."""
        places = {"coco": "annotations/instances_train.json", "voc": "VOC2007/Annotations/1.xml"}
        return self._root / places.get(kind, name)

    def run(self, kind: str, index: int, seed: int) -> Outcome:
        """Writes and reads a case, and returns the outcome."""
        name, data, rng = make_case(kind, index, seed)
        path = self.path(kind, name)
        path.write_bytes(data)
        self._events.clear()
        verdict, text = "read", ""
        try:
            with _time_limit(SECONDS), self._reading():
                read_file(kind, path, rng)
        except _TooSlowError:
            verdict, text = "hang", traceback.format_exc()
        except (DataError, WeightFileError) as error:
            verdict, text = "refused", str(error).replace(str(self._root), "")
            if len(text) > 2000 or "\n" in text:
                verdict, text = "crash", f"the message is no sentence: {text}"
        except BaseException:
            verdict, text = "crash", traceback.format_exc()
        if self._events:
            verdict, text = "crash", "\n".join(self._events)
        return Outcome(kind, index, name, verdict, text)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self._is_reading = True
        try:
            yield
        finally:
            self._is_reading = False


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
