"""The input pipeline on one core, against torchvision's data set and transforms: seconds an image."""

import contextlib
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image

from benchmarks.speed.measure import Sides, timed
from configs.common import CANVASES
from klbox_jax.data.coco import CocoSource
from klbox_jax.data.loader import check_fits, train_batches
from klbox_jax.data.plan import TrainPlan
from klbox_jax.data.transforms import Preprocessing

SPLIT = "train"
IMAGES, OBJECTS, BATCH = 48, 7, 8
# Images of one run of a side.
IMAGES_A_RUN = 24
# By the short side: the longest side and canvases that hold photographs of 4:3 and 3:4.
SIZES = {320: (533, ((320, 448), (448, 320))), 800: (1333, CANVASES[800, 1333])}

_FOLDER = contextlib.ExitStack()


def write_photographs(root: pathlib.Path, *, count: int = IMAGES) -> None:
    """Writes a COCO folder of photograph-sized images: noise of several scales, which compresses like photographs."""
    rng = np.random.default_rng(0)
    folder = root / SPLIT
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        width, height = (640, 480) if number % 4 else (480, 640)
        pixels = np.full((height, width, 3), 127.0)
        for cells, strength in ((6, 60), (40, 25), (160, 12)):
            noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
            pixels += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        name = f"{number}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name, quality=90)
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        for _ in range(OBJECTS):
            w, h = (int(side) for side in rng.integers(20, 200, 2))
            box = [int(rng.integers(0, width - w)), int(rng.integers(0, height - h)), w, h]
            entry = {"image_id": number + 1, "category_id": 1, "bbox": box, "area": w * h, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **entry})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations").mkdir()
    (root / "annotations" / f"instances_{SPLIT}.json").write_text(json.dumps(content))


def our_examples(root: pathlib.Path, short_side: int) -> Iterator[object]:
    """Yields the batches of a training without end."""
    long_side, canvases = SIZES[short_side]
    preprocessing = Preprocessing(
        short_side=short_side, long_side=long_side, canvases=canvases, max_gt=100, flip=True
    )
    source = CocoSource(root, SPLIT)
    plan = TrainPlan(check_fits(source, preprocessing), batch_size=BATCH, seed=0)
    return train_batches(source, plan, preprocessing, steps=range(10**6), num_threads=0)


def sides(short_side: int) -> Sides:
    """Returns the seconds an image of both on one core, for a short side of the resized images."""
    from benchmarks import torchvision_peer as peer

    root = pathlib.Path(_FOLDER.enter_context(tempfile.TemporaryDirectory()))
    write_photographs(root)
    ours = our_examples(root, short_side)
    theirs = peer.make_examples(root, SPLIT, short_side=short_side, long_side=SIZES[short_side][0])

    def take(examples: Iterator[object], count: int) -> Callable[[], float]:
        run = timed(lambda: sum(1 for _ in itertools.islice(examples, count)), share=1 / IMAGES_A_RUN)

        def on_one_core() -> float:
            with _one_thread(peer):
                return run()

        return on_one_core

    return Sides(ours=take(ours, IMAGES_A_RUN // BATCH), peer=take(theirs, IMAGES_A_RUN))


@contextlib.contextmanager
def _one_thread(peer) -> Iterator[None]:
    """Lets OpenCV and torch use a single thread inside the block."""
    before = cv2.getNumThreads(), peer.num_threads()
    cv2.setNumThreads(1)
    peer.use_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        peer.use_threads(before[1])
