"""Fills a detector's backbone from a file of pretrained weights."""

from typing import Any

from klbox_jax.weights.convert import load_weights


def initialize_backbone(params: dict[str, Any], *, name: str, path: str) -> dict[str, Any]:
    """Returns the detector's parameters with those of its backbone read from a file.

    Args:
        params: parameters of the whole detector.
        name: the backbone, as in `config.model.backbone.name`.
        path: the file.

    Raises:
        ValueError: nobody publishes weights for this backbone.
        WeightFileError: the file is unusable.
    """
    if name == "resnet":
        raise ValueError(
            "config.model.init_weights: no reader for the backbone 'resnet', whose weights start random; "
            "leave it empty"
        )
    backbone, _ = load_weights({"backbone": params["backbone"]}, path)
    return params | backbone
