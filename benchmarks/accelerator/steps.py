"""Timed training and eval steps of our detector."""

from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.detector import Detector, make_detector
from benchmarks.accelerator.flops import flops_per_image
from benchmarks.accelerator.plan import HARD, Cell
from benchmarks.accelerator.program import Job
from benchmarks.accelerator.sizes import Sizes
from benchmarks.accelerator.timing import median_seconds

# So small that the weights stay as they are, however many steps are timed.
LEARNING_RATE = 1e-6


def make_train_job(cell: Cell, sizes: Sizes, device: jax.Device) -> Job:
    """Returns the measurement of a training step: forward, backward and update, the batch already on the device."""
    detector = _detector(cell, sizes, device)

    def run(programs):
        program = programs["step"]
        state, batch = detector.first_state_on_device(), jax.device_put(detector.batch(cell.batch), device)
        loss = None

        def call():
            nonlocal state, loss
            # The step takes over the memory of its state.
            state, scalars = program.compiled(state, batch)
            loss = scalars["total_loss"]
            return state, loss

        timing = median_seconds(call, jax.block_until_ready, seconds=sizes.seconds)
        if not np.isfinite(loss):
            raise FloatingPointError("the loss of the training step is not finite")
        return program.record() | _speed(timing, cell, sizes, device)

    return Job({"step": lambda: detector.lower_train_step(cell.batch, learning_rate=LEARNING_RATE)}, run)


def make_inference_job(cell: Cell, sizes: Sizes, device: jax.Device) -> Job:
    """Returns the measurement of an eval step, from the images on the device to the detections on the device."""
    detector = _detector(cell, sizes, device)
    changes = {"suppression": "hard", "voting": "none"} if cell.variant == HARD else {}

    def run(programs):
        program = programs["step"]
        params, batch = jax.device_put((detector.params, detector.batch(cell.batch)), device)
        timing = median_seconds(
            lambda: program.compiled(params, batch), jax.block_until_ready, seconds=sizes.seconds
        )
        detections = program.compiled(params, batch)[""]
        return (
            program.record()
            | _speed(timing, cell, sizes, device)
            | {"detections_per_image": float(detections.valid.sum() / cell.batch)}
        )

    return Job({"step": lambda: detector.lower_eval_step(cell.batch, **changes)}, run)


def _detector(cell: Cell, sizes: Sizes, device: jax.Device) -> Detector:
    return make_detector(sizes.network, cell.precision, sizes.canvas, device)


def _speed(timing: dict[str, Any], cell: Cell, sizes: Sizes, device: jax.Device) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return timing | {
        "images_per_second": cell.batch / timing["seconds"],
        "flops": cell.batch * flops_per_image(sizes.network, sizes.canvas, train=cell.kind == "train"),
        # Of the process so far, not of this step alone.
        "process_peak_bytes": stats.get("peak_bytes_in_use"),
    }
