"""The full-scale detector whose step docs/scaling.md extrapolates: its arithmetic, gradients and anchors."""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import ml_collections

from benchmarks import model_report
from benchmarks.growth.extrapolate import Work
from benchmarks.growth.settings import Setting, make_config
from benchmarks.steps import param_shapes
from klbox_jax.models.build import build_model
from klbox_jax.train.optimizer import label_frozen

CONFIG, CLASSES = "faster_rcnn_resnet50_fpn", 80


@functools.cache
def full_scale_work() -> Work:
    """Returns the operations of R50-FPN on its largest canvas, and the bytes of the gradients of what is trained."""
    config = model_report.get_config(CONFIG)
    numbers = model_report.measure(config, num_classes=CLASSES)
    model = build_model(config.model, num_classes=CLASSES)
    params = param_shapes(model, model_report.example_batch(config.data))
    labels = label_frozen(config.optimizer.frozen)(params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
    return Work(
        step_flops=numbers["step_flops"],
        forward_flops=numbers["forward_flops"],
        gradient_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf, label in pairs if label == "trained"),
        gathered_bytes=0.0,
    )


def gathered_bytes(records: Sequence[Mapping]) -> float:
    """Returns the bytes of an image of R50-FPN that a training step would gather, with as many for each anchor as here.

    The records are those of `collectives.count_here`; 0 without one of several devices.
    """
    counted = [record for record in records if record["step"] == "train" and record["devices"] > 1]
    if not counted:
        return 0.0
    record = counted[-1]
    total = sum(one["bytes"] for one in record["collectives"] if one["kind"] == "all-gather")
    here = count_anchors(make_config(Setting()).model.rpn, Setting().canvas)
    config = model_report.get_config(CONFIG)
    there = count_anchors(config.model.rpn, max(config.data.canvases, key=math.prod))
    return total / record["images"] * there / here


def count_anchors(rpn: ml_collections.ConfigDict, canvas: tuple[int, int]) -> int:
    """Returns the anchors of an image, on all levels."""
    sides = [[math.ceil(side / 2**level) for side in canvas] for level in rpn.levels]
    return sum(map(math.prod, sides)) * len(rpn.anchor_sizes[0]) * len(rpn.aspect_ratios)
