"""Useful work of a step, counted from the shapes of its layers."""

import functools

import jax

from benchmarks.accelerator.batch import make_images
from benchmarks.accelerator.detector import build_network, params_of
from benchmarks.accelerator.network import NETWORKS
from benchmarks.flops import layer_flops


@functools.cache
def flops_per_image(name: str, canvas: tuple[int, int], *, train: bool) -> int:
    """Returns the operations of the convolutions and dense layers of a step, for each image; see `layer_flops`.

    Args:
        name: key of `NETWORKS`.
        canvas: height and width of the image.
        train: count a training step; otherwise an eval step.
    """
    network = NETWORKS[name]
    model = build_network(network, "float32")
    leaves, structure = jax.tree.flatten(make_images(1, canvas, num_classes=network.num_classes))

    def forward(params, leaves):
        batch = jax.tree.unflatten(structure, leaves)
        if train:
            return model.apply({"params": params}, batch, jax.random.key(0), method="train_forward").losses
        return model.apply({"params": params}, batch, method="predict").boxes.class_logits

    # An eval step has no backward pass: each layer works once, as if it were frozen.
    parts = tuple(params_of(name))
    frozen, lowest = (network.optimizer["frozen"], network.lowest_trained) if train else (parts, ())
    return layer_flops(forward, params_of(name), leaves, frozen=frozen, lowest_trained=lowest)
