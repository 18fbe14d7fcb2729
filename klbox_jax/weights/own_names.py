"""The layout of our own weight files, where a tensor has the path of its parameter as its name."""

import json
from collections.abc import Iterable

import numpy as np

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights.provenance import BoxCoder, Provenance
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.targets import Target, same

_CODERS = {coder.__name__: coder for coder in (CornerBoxCoder, CenterBoxCoder)}


def recognizes(names: Iterable[str]) -> bool:
    """Returns True for names of our own files."""
    return any(name.startswith("backbone/") for name in names)


def translate(name: str, *, pooled_side: int) -> Target:
    """Returns the place of a tensor, which is its name."""
    del pooled_side
    return Target(tuple(name.split("/")), same)


def prepare(
    state: dict[str, np.ndarray], *, provenance: Provenance, num_classes: int | None
) -> dict[str, np.ndarray]:
    """Returns the tensors unchanged."""
    del provenance, num_classes
    return state


def provenance(state: dict[str, np.ndarray], *, config: str) -> Provenance:
    """Returns the conventions in `config`, the metadata of the file; raises WeightFileError if they are missing."""
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
            f"its metadata lacks the conventions of its network ({error!r}); write the file "
            "with model_metadata(model) among its metadata."
        ) from error


def _coder(fields: dict) -> BoxCoder:
    return _CODERS[fields["name"]](tuple(map(float, fields["weights"])))
