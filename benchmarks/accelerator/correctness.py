"""Comparison of the steps on the device with float32 on its CPU, and a short training that must lower the loss."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.detector import Detector, make_detector
from benchmarks.accelerator.plan import Cell
from benchmarks.accelerator.program import Job
from benchmarks.accelerator.sizes import Sizes
from klbox_jax.structures import Detections

IMAGES = 2
LEARNING_STEPS = 20
# The sampler of the RoIs is replaced by a sample of all of them. So a rounding error that swaps two proposals changes
# no other RoI, and the losses of both devices are comparable.
CHANGES = {
    "rpn": {"pre_nms_topk": (200, 200), "post_nms_topk": (100, 100)},
    "roi_heads": {"batch_size_per_image": 512, "positive_fraction": 0.5},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Largest differences from float32 on the CPU.

    Attributes:
        loss: relative error of each loss and of the gradient's norm.
        box_quantile: share of the compared boxes that `box_error` holds for.
        box_error: largest distance of an edge, in pixels.
    """

    loss: float
    box_quantile: float
    box_error: float


# In float32 the device differs from the CPU only in the order of its sums. On a CPU, changes of 3e-6 of every
# parameter moved the boxes of ResNet-50-FPN by up to 0.0006 px. Changes of 5e-4, TF32's rounding, moved half of the
# boxes by up to 0.04 px, and bfloat16 by up to 0.2 px. A few boxes move far: where two scores are nearly equal,
# soft-NMS picks the other one first, which then has other voters. So their bound is on the median.
BOUNDS = {
    "float32": Bounds(loss=1e-4, box_quantile=1.0, box_error=0.01),
    "tf32": Bounds(loss=5e-3, box_quantile=0.5, box_error=0.2),
    "bfloat16": Bounds(loss=3e-2, box_quantile=0.5, box_error=1.0),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of one device in one precision, on the host.

    Attributes:
        scalars: metrics of the first training step.
        losses: total loss of each training step.
        detections: of the eval step under the initial parameters.
    """

    scalars: Mapping[str, float]
    losses: tuple[float, ...]
    detections: Detections


def run_steps(detector: Detector, train_step: Callable, eval_step: Callable, *, steps: int) -> Outcome:
    """Runs compiled steps on the detector's device.

    Args:
        detector: gives parameters and batch.
        train_step, eval_step: compiled for its device.
        steps: number of training steps.
    """
    batch = detector.batch(IMAGES)
    detections = jax.device_get(eval_step(detector.params, batch)[""])
    state = detector.first_state_on_device()
    scalars, losses = {}, []
    for _ in range(steps):
        state, found = train_step(state, batch)
        found = {name: float(value) for name, value in found.items()}
        scalars = scalars or found
        losses.append(found["total_loss"])
    return Outcome(scalars, tuple(losses), detections)


def make_correctness_job(cell: Cell, sizes: Sizes, device: jax.Device) -> Job:
    """Returns the check of the network `cell.variant` in each precision of `sizes.checked_precisions`."""
    canvas = sizes.checked[cell.variant]
    detectors = {
        precision: make_detector(cell.variant, precision, canvas, device, **CHANGES)
        for precision in sizes.checked_precisions
    }
    reference = "float32"
    # Where the device is a CPU, its own float32 is the reference.
    if device.platform != "cpu":
        reference = "float32 on the CPU"
        detectors[reference] = make_detector(
            cell.variant, "float32", canvas, jax.devices("cpu")[0], **CHANGES
        )
    programs = {}
    for name, detector in detectors.items():
        rate = detector.network.learning_rate
        programs[f"{name}/train"] = functools.partial(detector.lower_train_step, IMAGES, learning_rate=rate)
        programs[f"{name}/eval"] = functools.partial(detector.lower_eval_step, IMAGES)

    def run(programs):
        def outcome(name, steps):
            compiled = (programs[f"{name}/{step}"].compiled for step in ("train", "eval"))
            return run_steps(detectors[name], *compiled, steps=steps)

        expected = outcome(reference, 1)
        return {
            precision: compare(expected, outcome(precision, LEARNING_STEPS), BOUNDS[precision])
            for precision in sizes.checked_precisions
        }

    return Job(programs, run)


def compare(reference: Outcome, found: Outcome, bounds: Bounds) -> dict[str, Any]:
    """Returns the differences, and a sentence for each bound that is not kept.

    Losses are compared to the reference's, with a floor of 1 % of its total. The better half of the reference's
    detections is compared, each with the closest detection of its class; a detection without one counts as infinitely
    far.
    """
    errors = _relative_errors(reference.scalars, found.scalars)
    distances = np.concatenate(
        [
            box_distances(*(_of_image(outcome.detections, i) for outcome in (reference, found)))
            for i in range(IMAGES)
        ]
    )
    box_error = (
        float(np.quantile(distances, bounds.box_quantile, method="higher")) if len(distances) else np.inf
    )
    count = max(1, len(found.losses) // 4)
    first, last = float(np.mean(found.losses[:count])), float(np.mean(found.losses[-count:]))
    failures = []
    if not np.isfinite([*found.scalars.values(), *found.losses]).all():
        failures.append("a metric of the training steps is not finite")
    failures += [
        f"{name} differs by {error:.1e} of itself; {bounds.loss:.0e} is allowed"
        for name, error in errors.items()
        if not error <= bounds.loss
    ]
    if not box_error <= bounds.box_error:
        failures.append(
            f"{bounds.box_quantile:.0%} of the boxes differ by up to {box_error:.2g} px; {bounds.box_error} is allowed"
        )
    if not last < first:
        failures.append(f"{len(found.losses)} steps raise the loss from {first:.4g} to {last:.4g}")
    return {
        "loss_errors": {name: _finite(error) for name, error in errors.items()},
        "boxes": len(distances),
        "box_error": _finite(box_error),
        "largest_box_error": _finite(distances.max(initial=0.0)),
        "first_loss": _finite(first),
        "last_loss": _finite(last),
        "bounds": dataclasses.asdict(bounds),
        "failures": failures,
    }


def _relative_errors(reference: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    floor = 0.01 * reference["total_loss"]
    return {
        name: abs(found[name] - value) / max(abs(value), floor)
        for name, value in reference.items()
        if name.startswith("loss_") or name == "grad_norm"
    }


def _of_image(detections: Detections, index: int) -> Detections:
    return jax.tree.map(lambda values: values[index], detections)


def box_distances(reference: Detections, found: Detections) -> np.ndarray:
    """Returns, for the better half of one image's reference detections, the distance to the closest of the same class.

    The distance of two boxes is that of their most distant edges, in pixels.
    """
    count = (int(reference.valid.sum()) + 1) // 2
    boxes, classes = reference.boxes[:count], reference.classes[:count]
    distances = np.abs(boxes[:, None] - found.boxes[None]).max(axis=-1)
    comparable = (classes[:, None] == found.classes[None]) & found.valid[None]
    return np.where(comparable, distances, np.inf).min(axis=1)


def _finite(value: float) -> float | None:
    """Returns None for infinity and NaN, which JSON has no form for."""
    return float(value) if np.isfinite(value) else None
