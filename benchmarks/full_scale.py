"""Measures one training step and one prediction of R50-FPN at full scale: peak memory and seconds, and torchvision's.

    python -m benchmarks.full_scale --output=runs/full_scale

Both detectors have random weights and see one random image of 800 x 1344 pixels with ten objects, in float32. Ours is
configs/faster_rcnn_resnet50_fpn.py, with KL Loss, and its predictions are post-processed; theirs is
`fasterrcnn_resnet50_fpn` with frozen batch norm, three trained stages, 81 outputs, and no resizing. Both train stages 3
to 5, sample 512 RoIs, and use 1000 proposals in a prediction. Each measurement has a process to itself, one after the
other. Writes full_scale.json and prints a table. torchvision is the extra `parity`.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping

import numpy as np
from absl import flags

from benchmarks.speed.measure import timed
from benchmarks.speed.memory import peak_bytes
from klbox_jax import cli
from klbox_jax.files import write_json
from klbox_jax.report import columns
from klbox_jax.report.columns import Column

# JAX and torch are imported where they are used: neither should count for the other.

CONFIG = "faster_rcnn_resnet50_fpn"
CANVAS = (800, 1344)
NUM_CLASSES = 80
NUM_OBJECTS = 10


def image_and_objects() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a random image, height x width x 3, and the boxes and classes of its objects."""
    rng = np.random.default_rng(0)
    height, width = CANVAS
    corners = rng.uniform(0.0, 0.6, (NUM_OBJECTS, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.05, 0.4, (NUM_OBJECTS, 2))], axis=1)
    return (
        rng.integers(0, 256, (height, width, 3), np.uint8),
        (boxes * (width, height, width, height)).astype(np.float32),
        rng.integers(0, NUM_CLASSES, NUM_OBJECTS).astype(np.int32),
    )


def ours(*, train: bool) -> dict[str, float]:
    """Compiles our step, runs it twice, and returns the seconds of each."""
    from benchmarks.model_report import example_batch, get_config
    from benchmarks.steps import make_step
    from klbox_jax.compilation import give_back_freed_memory

    config = get_config(CONFIG, "loss=kl")
    image, boxes, classes = image_and_objects()
    batch = example_batch(config.data)
    batch.images[0] = image
    batch.gt.boxes[0, :NUM_OBJECTS], batch.gt.classes[0, :NUM_OBJECTS] = boxes, classes
    batch.gt.valid[0, NUM_OBJECTS:] = False
    step = make_step("train" if train else "eval", config, batch, classes=NUM_CLASSES)
    started = time.perf_counter()
    compiled = step.lower().compile()
    compile_seconds = time.perf_counter() - started
    # Like the training loop, before the first step.
    give_back_freed_memory()
    run = step.runner(compiled)
    del step
    return {"compile": compile_seconds, "first": timed(run)(), "second": timed(run)()}


def theirs(*, train: bool) -> dict[str, float]:
    """Runs torchvision's step twice, and returns the seconds of each."""
    from torchvision.models.detection import FasterRCNN

    from benchmarks import torchvision_peer as peer

    image, boxes, classes = image_and_objects()
    images = peer.make_images(image[None])
    sizes = {"num_classes": NUM_CLASSES + 1, "min_size": CANVAS[0], "max_size": CANVAS[1]}
    model = peer.build(FasterRCNN, seed=0, trainable_layers=3, **sizes)
    if train:
        targets = peer.make_targets(boxes[None], classes[None])
        run = peer.train_step(model, images, targets, learning_rate=0.02 / 16)
    else:
        run = peer.inference(model, images)
    return {"first": timed(run)(), "second": timed(run)()}


# Measurements by name: the function, and its argument `train`.
PARTS = {
    "ours, training step": (ours, True),
    "ours, prediction": (ours, False),
    "torchvision, training step": (theirs, True),
    "torchvision, prediction": (theirs, False),
}


def measure(part: str) -> dict[str, float]:
    """Returns the numbers of a part from a process of its own: `peak_gb`, and seconds.

    Raises RuntimeError if the process failed; its messages are above.
    """
    command = [sys.executable, "-m", "benchmarks.full_scale", f"--part={part}"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{part}: the process ended with status {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the Markdown table of the parts; a number that a part does not have is a dash."""
    seconds = {"compile": "compilation, s", "first": "first run, s", "second": "second run, s"}
    table_columns = (
        Column("", lambda row: row["part"]),
        columns.number("peak_gb", ".2f", "peak memory, GB"),
        *columns.numbers(".1f", seconds),
    )
    return columns.table(table_columns, [{"part": part} | row for part, row in measured.items()])


def main(_: list[str]) -> None:
    """Measures all parts, or prints the numbers of one that is measured here."""
    if _PART.value:
        function, train = PARTS[_PART.value]
        seconds = function(train=train)
        print(json.dumps({"peak_gb": peak_bytes() / 1e9} | seconds))
        return
    measured = {part: measure(part) for part in PARTS}
    write_json(pathlib.Path(_OUTPUT.value) / "full_scale.json", measured)
    print(table(measured))


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "runs/full_scale", "Folder of full_scale.json.")
    _PART = flags.DEFINE_string("part", "", "Measure this part here, and print its numbers as JSON.")
    cli.start(main)
