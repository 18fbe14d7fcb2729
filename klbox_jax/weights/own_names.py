"""The layout of our own weight files: a tensor is named by the path of its parameter; see `safetensors_file`."""

import json
from collections.abc import Iterable

import numpy as np

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights.provenance import BoxCoder, Provenance
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.targets import Target, same

_CODERS = {coder.__name__: coder for coder in (CornerBoxCoder, CenterBoxCoder)}


def recognizes(names: Iterable[str]) -> bool:
    """Whether these are our names."""
    return any(name.startswith("backbone/") for name in names)


def translate(name: str, *, pooled_side: int) -> Target:
    """Returns where a tensor goes: its name says so."""
    del pooled_side
    return Target(tuple(name.split("/")), same)


def prepare(
    state: dict[str, np.ndarray], *, provenance: Provenance, num_classes: int | None
) -> dict[str, np.ndarray]:
    """Returns the tensors as they are."""
    del provenance, num_classes
    return state


def provenance(state: dict[str, np.ndarray], *, config: str) -> Provenance:
    """Returns the conventions that the file's metadata holds, `config`; raises WeightFileError without any."""
    del state
    try:
        fields = json.loads(config)
        return Provenance(
            source="klbox_jax",
            pixel_mean=tuple(map(float, fields["pixel_mean"])),
            pixel_std=tuple(map(float, fields["pixel_std"])),
            channel_order="rgb",
            stride_in_1x1=fields["stride_in_1x1"],
            box_coder=_coder(fields["box_coder"]),
            rpn_box_coder=_coder(fields["rpn_box_coder"]),
            anchor_offset=fields["anchor_offset"],
            aligned_pooling=fields["aligned_pooling"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightFileError(
            f"its metadata lack the conventions of its network ({error!r}); write the file "
            "with model_metadata(model) among its metadata."
        ) from error


def _coder(fields: dict) -> BoxCoder:
    return _CODERS[fields["name"]](tuple(map(float, fields["weights"])))
