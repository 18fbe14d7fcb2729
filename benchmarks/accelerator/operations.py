"""Timed operations of our detector: a large product, post-processing, NMS and RoIAlign."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.detector import PRECISIONS, make_detector
from benchmarks.accelerator.network import NETWORKS
from benchmarks.accelerator.plan import Cell
from benchmarks.accelerator.pooling import make_pooling_inputs
from benchmarks.accelerator.program import Job
from benchmarks.accelerator.sizes import Sizes
from benchmarks.accelerator.timing import median_seconds
from klbox_jax.evaluation.eval_step import detect_batch
from klbox_jax.models.generalized_rcnn import Predictions
from klbox_jax.ops.nms import suppress_sorted
from klbox_jax.ops.roi_pooler import RoIPooler
from klbox_jax.structures import BoxPredictions, Proposals

# Post-processing that is timed alone.
SETTINGS = {
    "hard NMS": {"suppression": "hard", "voting": "none"},
    "hard NMS and voting": {"suppression": "hard", "voting": "variance"},
    "soft-NMS": {"suppression": "soft_gaussian", "voting": "none"},
    "soft-NMS and voting": {"suppression": "soft_gaussian", "voting": "variance"},
}
# Proposals around each object of the synthetic predictions.
PROPOSALS_PER_OBJECT = 20
# Of the synthetic predictions: what the logit of the object's class exceeds the others by, on average.
CLASS_LOGIT = 4.0


def make_product_job(cell: Cell, sizes: Sizes, device: jax.Device) -> Job:
    """Returns the measurement of a product of two large square matrices: the rate that the device reaches."""
    side = sizes.product_side
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(PRECISIONS[cell.precision].dtype)
    matrices = tuple(rng.standard_normal((side, side), np.float32).astype(dtype) for _ in range(2))

    def result(timing):
        return {"flops_per_second": 2 * side**3 / timing["seconds"], "side": side}

    return _operation_job(jnp.matmul, matrices, cell, sizes, device, result)


def make_nms_job(cell: Cell, sizes: Sizes, device: jax.Device) -> Job:
    """Returns the measurement of the RPN's hard NMS: each level of each image alone."""
    rpn = NETWORKS[sizes.network].model["rpn"]
    boxes = np.stack(
        [
            np.stack(
                [
                    _clustered_boxes(rpn["pre_nms_topk"][1], sizes.canvas, seed=(image, level))[0]
                    for level in rpn["levels"]
                ]
            )
            for image in range(cell.batch)
        ]
    )

    def nms(boxes):
        valid = jnp.ones(boxes.shape[0], bool)
        return suppress_sorted(boxes, valid, iou_threshold=rpn["nms_threshold"])

    return _operation_job(jax.vmap(jax.vmap(nms)), (boxes,), cell, sizes, device, lambda timing: {})


def make_pooling_job(cell: Cell, sizes: Sizes, device: jax.Device) -> Job:
    """Returns the measurement of RoIAlign of the pyramid, and of RoIAlign with the gradient of the pyramid."""
    model = NETWORKS[sizes.network].model
    pooler = jax.vmap(RoIPooler(**model["box_pooler"]))
    inputs = make_pooling_inputs(cell.batch, sizes.canvas, model)
    dtype = jnp.dtype(PRECISIONS[cell.precision].dtype)
    pyramid = {name: features.astype(dtype) for name, features in inputs.pyramid.items()}
    arriving = inputs.cotangent.astype(dtype)

    def with_gradient(pyramid, boxes, arriving):
        pooled, backward = jax.vjp(lambda pyramid: pooler(pyramid, boxes), pyramid)
        return pooled, backward(arriving)

    arguments = {"forward": (pyramid, inputs.boxes), "forward_backward": (pyramid, inputs.boxes, arriving)}
    functions = {"forward": pooler, "forward_backward": with_gradient}

    def run(programs):
        return {name: _time_program(programs[name], arguments[name], sizes, device)[0] for name in functions}

    return Job({name: _lowering(functions[name], arguments[name], cell, device) for name in functions}, run)


def make_postprocess_job(cell: Cell, sizes: Sizes, device: jax.Device) -> Job:
    """Returns the measurement of the post-processing alone, under each of `SETTINGS`, on synthetic predictions."""
    detector = make_detector(sizes.network, cell.precision, sizes.canvas, device)
    arguments = (_synthetic_predictions(sizes, cell.batch), detector.batch(cell.batch))

    def detect_under(changes):
        def detect(predictions, batch):
            settings = detector.settings(**changes)
            return detect_batch({}, predictions, batch, model=detector.model, settings=settings)

        return detect

    def run(programs):
        results = {}
        for name, program in programs.items():
            results[name], found = _time_program(program, arguments, sizes, device)
            results[name]["detections_per_image"] = float(found.valid.sum() / cell.batch)
        return results

    return Job(
        {
            name: _lowering(detect_under(changes), arguments, cell, device)
            for name, changes in SETTINGS.items()
        },
        run,
    )


def _operation_job(
    function: Callable,
    arguments: tuple[Any, ...],
    cell: Cell,
    sizes: Sizes,
    device: jax.Device,
    result: Callable[[dict[str, Any]], dict[str, Any]],
) -> Job:
    """The measurement of one function; `result` makes further numbers of its timing."""

    def run(programs):
        timing, _ = _time_program(programs["operation"], arguments, sizes, device)
        return timing | result(timing)

    return Job({"operation": _lowering(function, arguments, cell, device)}, run)


def _lowering(function: Callable, arguments: tuple[Any, ...], cell: Cell, device: jax.Device) -> Callable:
    def lower():
        with jax.default_matmul_precision(PRECISIONS[cell.precision].matmul), jax.default_device(device):
            # A new function each time: jit would reuse a trace under another precision.
            return jax.jit(lambda *arguments: function(*arguments)).lower(*arguments)

    return lower


def _time_program(program, arguments, sizes: Sizes, device: jax.Device) -> tuple[dict[str, Any], Any]:
    """Returns the record of a program with its timing, and its result."""
    arguments = jax.device_put(arguments, device)
    timing = median_seconds(
        lambda: program.compiled(*arguments), jax.block_until_ready, seconds=sizes.seconds / 2
    )
    return program.record() | timing, program.compiled(*arguments)


def _clustered_boxes(count: int, canvas: tuple[int, int], *, seed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in clusters around objects of many sizes, in random order, and the object of each."""
    rng = np.random.default_rng(seed)
    objects = -(-count // PROPOSALS_PER_OBJECT)
    size = np.array(canvas[::-1])
    sides = np.exp(rng.uniform(np.log(min(canvas) / 32), np.log(min(canvas) / 2), (objects, 2)))
    corners = rng.uniform(size=sides.shape) * (size - sides)
    chosen = rng.integers(0, objects, count)
    noise = rng.normal(0, 0.08, (count, 4)) * np.tile(sides[chosen], 2)
    boxes = np.concatenate([corners, corners + sides], axis=1)[chosen] + noise
    return np.clip(boxes, 0, np.tile(size, 2)).astype(np.float32), chosen


def _synthetic_predictions(sizes: Sizes, batch: int) -> Predictions:
    """Predictions of a network that sees the same objects in many proposals: work for NMS and voting."""
    network = NETWORKS[sizes.network]
    count = network.model["rpn"]["post_nms_topk"][1]
    rows = 1 if network.model["roi_heads"]["class_agnostic"] else network.num_classes
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((batch, count, *shape), np.float32)

    clusters = [_clustered_boxes(count, sizes.canvas, seed=image) for image in range(batch)]
    boxes, objects = (np.stack(values) for values in zip(*clusters, strict=True))
    # The last class is the background.
    is_class = objects[..., None] % network.num_classes == np.arange(network.num_classes + 1)
    return Predictions(
        boxes=BoxPredictions(
            class_logits=normal(network.num_classes + 1) + np.float32(CLASS_LOGIT) * is_class,
            box_deltas=0.5 * normal(rows, 4),
            box_log_vars=normal(rows, 4),
        ),
        proposals=Proposals(
            boxes=boxes,
            objectness_logits=np.zeros((batch, count), np.float32),
            valid=np.ones((batch, count), bool),
        ),
        pyramid={},
    )
