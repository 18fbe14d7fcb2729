"""Which reader fills which backbone from a file of pretrained weights."""

from typing import Any

from klbox_jax.weights.mobilenet_v2 import load_mobilenet_v2

LOADERS = {"mobilenet_v2": load_mobilenet_v2}


def initialize_backbone(params: dict[str, Any], *, name: str, path: str) -> dict[str, Any]:
    """Returns the detector's parameters with those of its backbone read from a file.

    Args:
        params: parameters of the whole detector.
        name: the backbone, as in `config.model.backbone.name`.
        path: the file.

    Raises:
        ValueError: there is no reader for this backbone.
        WeightFileError: the file is unusable.
    """
    if name not in LOADERS:
        raise ValueError(
            f"config.model.init_weights: no reader for the backbone {name!r}, only for {', '.join(LOADERS)}; "
            "leave it empty to train from random weights"
        )
    return params | {"backbone": LOADERS[name](path, params["backbone"])}
