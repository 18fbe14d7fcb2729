"""The useful work of a training step, counted from the shapes of its layers."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from benchmarks.speed.detector import TRAIN_IMAGES, Detector, make_batch

# The layers right above those that `frozen` holds in this detector: their inputs need no gradient.
LOWEST_TRAINED = ("backbone/res3_0/conv1", "backbone/res3_0/shortcut", "fpn/fpn_lateral2")


def train_step_flops(detector: Detector) -> int:
    """Returns the operations of the detector's training step on its batch; see `step_flops`."""
    leaves, structure = jax.tree.flatten(make_batch(TRAIN_IMAGES))
    key = jax.random.key(0)

    def forward(params, leaves):
        batch = jax.tree.unflatten(structure, leaves)
        return detector.model.apply({"params": params}, batch, key, method="train_forward").losses

    return step_flops(forward, detector.params, leaves, frozen=detector.config.optimizer.frozen)


def step_flops(forward: Callable[..., Any], *arguments: Any, frozen: tuple[str, ...]) -> int:
    """Returns the operations of the convolutions and dense layers of a training step, from their shapes.

    A layer does two operations for each multiply-add, once on the way forward. On the way back it does as many again
    for the gradient of its kernel unless it is frozen, and as many for that of its input unless all below is frozen.
    Nothing else counts, pooling and what is computed twice included.

    Args:
        forward: calls the layers; is only traced.
        *arguments: of `forward`.
        frozen: prefixes of the paths of frozen layers.
    """
    total = 0

    def count(call, args, kwargs, context):
        nonlocal total
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and "kernel" in context.module.variables.get("params", {}):
            kernel = context.module.variables["params"]["kernel"]
            once = 2 * output.size * kernel.size // kernel.shape[-1]
            path = "/".join(context.module.path)
            total += once * passes(path, frozen=frozen)
        return output

    with nn.intercept_methods(count):
        jax.eval_shape(forward, *arguments)
    return total


def passes(path: str, *, frozen: tuple[str, ...]) -> int:
    """Returns how often the layer of that path does its work in a step: forward, for the kernel, for the input."""
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in frozen):
        return 1
    return 2 if path in LOWEST_TRAINED else 3
