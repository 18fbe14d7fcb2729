"""Useful work of a step, counted from the shapes of its layers."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from benchmarks.accelerator.batch import make_batch
from benchmarks.accelerator.detector import build_network, params_of
from benchmarks.accelerator.network import NETWORKS, Network


@functools.cache
def flops_per_image(name: str, canvas: tuple[int, int], *, train: bool) -> int:
    """Returns the operations of the convolutions and dense layers of a step, for each image of its batch.

    A layer does two operations for each multiply-add, once in the forward pass. In the backward pass it does as many
    for the gradient of its kernel unless it is frozen, and as many for that of its input unless all layers below are
    frozen. Nothing else counts: no pooling, no activations, and nothing that is computed twice.

    Args:
        name: key of `NETWORKS`.
        canvas: height and width of the image.
        train: count a training step; otherwise an eval step.
    """
    network = NETWORKS[name]
    model = build_network(network, "float32")
    batch = make_batch(1, canvas, num_classes=network.num_classes)

    def forward(params):
        if train:
            return model.apply({"params": params}, batch, jax.random.key(0), method="train_forward").losses
        return model.apply({"params": params}, batch, method="predict").boxes

    passes = functools.partial(training_passes, network) if train else lambda path: 1
    return count_layers(forward, params_of(name), passes=passes)


def count_layers(forward: Callable[[Any], Any], params: Any, *, passes: Callable[[str], int]) -> int:
    """Returns the operations of the layers with kernels that `forward` calls; traces it only.

    Args:
        forward: a function of the parameters.
        params: its argument.
        passes: path of a layer to the number of times that it does its work.
    """
    total = 0

    def count(call, args, kwargs, context):
        nonlocal total
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and "kernel" in context.module.variables.get("params", {}):
            kernel = context.module.variables["params"]["kernel"]
            once = 2 * output.size * kernel.size // kernel.shape[-1]
            total += once * passes("/".join(context.module.path))
        return output

    with nn.intercept_methods(count):
        jax.eval_shape(forward, params)
    return total


def training_passes(network: Network, path: str) -> int:
    """Returns how often a layer does its work in a training step: forward, for its kernel, for its input."""
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in network.optimizer["frozen"]):
        return 1
    return 2 if path in network.without_input_gradient else 3
