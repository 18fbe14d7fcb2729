"""Loads torchvision's ImageNet weights into the MobileNetV2 backbone."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from klbox_jax.models.mobilenet import STAGES
from klbox_jax.weights.torch_file import WeightFileError, read_torch_file

# Of RGB values between 0 and 1: what torchvision's ImageNet classifiers were trained with.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

NORM_NAMES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torch_names() -> dict[tuple[str, ...], str]:
    """Returns torchvision's name of every param of `MobileNetV2(with_head=True)`, by its path."""
    names = {}

    def add(path: tuple[str, ...], conv: str, norm: str):
        names[*path, "conv", "kernel"] = f"{conv}.weight"
        for ours, theirs in NORM_NAMES.items():
            names[*path, "norm", ours] = f"{norm}.{theirs}"

    add(("stem",), "features.0.0", "features.0.1")
    expansions = [expansion for expansion, _, blocks, _ in STAGES for _ in range(blocks)]
    for number, expansion in enumerate(expansions, start=1):
        # Convolutions with an activation are wrapped with their norm; the last stands beside its own.
        wrapped = ["depthwise"] if expansion == 1 else ["expand", "depthwise"]
        torch_block = f"features.{number}.conv"
        for index, part in enumerate(wrapped):
            add((f"block_{number}", part), f"{torch_block}.{index}.0", f"{torch_block}.{index}.1")
        last = len(wrapped)
        add((f"block_{number}", "project"), f"{torch_block}.{last}", f"{torch_block}.{last + 1}")
    head = len(expansions) + 1
    add(("head",), f"features.{head}.0", f"features.{head}.1")
    return names


def load_mobilenet_v2(path: str | os.PathLike, params: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the backbone's `params` with the values of torchvision's state dict at `path`.

    The classifier is left out, and so is the head of a backbone without one.

    Args:
        path: a file of `torch.save`, such as torchvision's `mobilenet_v2-b0353104.pth`.
        params: the `params` collection of a `MobileNetV2`; only shapes and dtypes are read.

    Raises:
        WeightFileError: the file cannot be read, or a tensor is missing, unexpected, of another shape or
            not finite.
        ValueError: `params` are not those of a `MobileNetV2`.
    """
    path = os.fspath(path)
    remedy = "give the state dict of torchvision's mobilenet_v2 at width 1.0"
    names = torch_names()
    templates = flatten_dict(params)
    if set(templates) not in (set(names), {key for key in names if key[0] != "head"}):
        raise ValueError("params are not the params of a MobileNetV2 backbone.")

    state = read_torch_file(path)
    unexpected = [
        name
        for name in state
        if not name.startswith("classifier.")
        and not name.endswith(".num_batches_tracked")
        and name not in names.values()
    ]
    if unexpected:
        raise WeightFileError(f"{path}: holds an unexpected tensor {unexpected[0]!r}; {remedy}.")

    loaded = {}
    for key, template in templates.items():
        name = names[key]
        if name not in state:
            raise WeightFileError(f"{path}: lacks the tensor {name!r}; {remedy}.")
        value = state[name]
        if key[-1] == "kernel" and value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)  # OIHW to HWIO
        if value.shape != template.shape:
            raise WeightFileError(
                f"{path}: {name!r} has shape {state[name].shape}, which does not fit; {remedy}."
            )
        if not np.isfinite(value.astype(np.float32)).all():
            raise WeightFileError(f"{path}: {name!r} is not finite; {remedy}.")
        loaded[key] = jnp.asarray(value, template.dtype)
    return unflatten_dict(loaded)
