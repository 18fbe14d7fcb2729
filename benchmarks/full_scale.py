"""One training step and one prediction of R50-FPN at full scale: peak memory and seconds, beside torchvision's.

    python -m benchmarks.full_scale --output=runs/full_scale

Both detectors have random weights and see one random image of 800 x 1344 pixels with ten objects, in float32. Ours is
configs/faster_rcnn_resnet50_fpn.py, with KL Loss, and its predictions are post-processed; theirs is
`fasterrcnn_resnet50_fpn` with frozen batch norm, three trained stages, 81 outputs, and no resizing. Both train stages 3
to 5, sample 512 RoIs, and look at 1000 proposals in a prediction. Each measurement has a process to itself, one after
the other. Writes full_scale.json and prints a table. torchvision is the extra `parity`.
"""

import functools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags

from benchmarks.speed.memory import peak_bytes

# Both frameworks are imported where they are used: neither should pay for the other.

CONFIG = "configs/faster_rcnn_resnet50_fpn.py"
CANVAS = (800, 1344)
NUM_CLASSES = 80
NUM_OBJECTS = 10


def image_and_objects():
    """Returns a random image, height x width x 3, and the boxes and classes of its objects."""
    import numpy as np

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
    import jax

    from benchmarks.model_report import example_batch
    from experiments.runs import load_config
    from klbox_jax.compilation import give_back_freed_memory
    from klbox_jax.distributed import make_mesh
    from klbox_jax.evaluation.eval_step import compile_eval_step
    from klbox_jax.models.build import build_model
    from klbox_jax.postprocess.settings import PostprocessSettings
    from klbox_jax.train.init_or_restore import dummy_batch
    from klbox_jax.train.optimizer import build_optimizer
    from klbox_jax.train.step import compile_train_step, create_state

    config = load_config(CONFIG, "loss=kl", {})
    image, boxes, classes = image_and_objects()
    batch = example_batch(config.data)
    batch.images[0] = image
    batch.gt.boxes[0, :NUM_OBJECTS], batch.gt.classes[0, :NUM_OBJECTS] = boxes, classes
    batch.gt.valid[0, NUM_OBJECTS:] = False

    optimizer, schedule = build_optimizer(config.optimizer, batch_size=1, accumulate_steps=1, total_steps=100)
    model = build_model(config.model, num_classes=NUM_CLASSES)
    dummy = dummy_batch((64, 64))
    if train:
        state = create_state(model, optimizer, batch=dummy, seed=0)
        step = compile_train_step(
            make_mesh(),
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            seed=0,
            frozen=config.optimizer.frozen,
        )
    else:
        init = functools.partial(model.init, method="init_all_heads")
        state = jax.jit(init)(jax.random.key(0), dummy)["params"]
        settings = {"": PostprocessSettings(**config.postprocess)}
        step = compile_eval_step(make_mesh(), model=model, settings=settings)
    started = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    # As the training loop does, before the first step.
    give_back_freed_memory()

    def run():
        nonlocal state
        found = jax.block_until_ready(compiled(state, batch))
        if train:
            state, _ = found

    return {"compile": compile_seconds, "first": _seconds(run), "second": _seconds(run)}


def theirs(*, train: bool) -> dict[str, float]:
    """Runs torchvision's step twice, and returns the seconds of each."""
    import torch
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    image, boxes, classes = image_and_objects()
    images = [torch.from_numpy(image).permute(2, 0, 1).float() / 255]
    targets = [{"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(classes).long() + 1}]
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    model = FasterRCNN(backbone, NUM_CLASSES + 1, min_size=CANVAS[0], max_size=CANVAS[1]).train(train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02 / 16, momentum=0.9, weight_decay=1e-4)

    def run():
        if not train:
            with torch.inference_mode():
                model(images)
            return
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {"first": _seconds(run), "second": _seconds(run)}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# The names of the measurements, each with its function and what it does.
PARTS = {
    "ours, training step": (ours, True),
    "ours, prediction": (ours, False),
    "torchvision, training step": (theirs, True),
    "torchvision, prediction": (theirs, False),
}


def measure(part: str) -> dict[str, float]:
    """Returns what a process of its own says of a part: `peak_gb`, and seconds.

    Raises:
        RuntimeError: the process failed; its messages are above.
    """
    command = [sys.executable, "-m", "benchmarks.full_scale", f"--part={part}"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{part}: the process ended with status {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the Markdown table of the parts; what a part does not have is a dash."""
    from klbox_jax.report.tables import markdown_table

    columns = {
        "peak memory, GB": ("peak_gb", ".2f"),
        "compilation, s": ("compile", ".1f"),
        "first run, s": ("first", ".1f"),
        "second run, s": ("second", ".1f"),
    }
    rows = [
        (part, *(format(row[name], form) if name in row else "-" for name, form in columns.values()))
        for part, row in measured.items()
    ]
    return markdown_table(("", *columns), rows)


def _main(argv: list[str]) -> None:
    del argv
    if _PART.value:
        function, train = PARTS[_PART.value]
        seconds = function(train=train)
        print(json.dumps({"peak_gb": peak_bytes() / 1e9} | seconds))
        return
    measured = {part: measure(part) for part in PARTS}
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    (output / "full_scale.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(table(measured))


if __name__ == "__main__":
    # Not at the top: other programs have flags of these names, and tests import them into one process.
    _OUTPUT = flags.DEFINE_string("output", "runs/full_scale", "Folder of full_scale.json.")
    _PART = flags.DEFINE_string("part", "", "Measure this one here, and print its numbers as JSON.")
    app.run(_main)
