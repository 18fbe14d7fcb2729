"""Conventions of a checkpoint's network that are not in its tensors: pixel statistics, coders, strides."""

import dataclasses
from typing import Any, Literal

import numpy as np

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights.restricted_unpickler import WeightFileError

BoxCoder = CornerBoxCoder | CenterBoxCoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """The conventions of a checkpoint, in addition to its tensors.

    Attributes:
        source: the code that wrote it.
        pixel_mean, pixel_std: statistics of the channels in RGB order, 0 to 255, in any order of the file.
        channel_order: channel order of the images that the file's network reads. The first convolution of a 'bgr'
            file is flipped when it is loaded, so that ours reads RGB.
        stride_in_1x1: True if a bottleneck has its stride in the first 1x1 convolution (the original ResNet of MSRA)
            and not in the 3x3 convolution; None for other backbones.
        box_coder: coder of the box head; None for a file of a backbone.
        rpn_box_coder: coder of the anchors; None for a file of a backbone.
        anchor_offset: position of an anchor's centre in its cell, in cells; None for a file of a backbone.
        aligned_pooling: True if RoIAlign has the centre of cell `i` at `i + 0.5`, and False if at `i`; None for a
            file of a backbone.
        plus_one_widths: True if a box is `x2 - x1 + 1` wide. With `x2` moved by one pixel to the outer edge both
            coders are those of continuous edges; a RoI is then pooled from a region one pixel shorter.
    """

    source: str
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    channel_order: Literal["rgb", "bgr"]
    stride_in_1x1: bool | None
    box_coder: BoxCoder | None = None
    rpn_box_coder: BoxCoder | None = None
    anchor_offset: float | None = None
    aligned_pooling: bool | None = None
    plus_one_widths: bool = False


def check_provenance(config_model: Any, provenance: Provenance) -> None:
    """Raises WeightFileError if a model is configured for other inputs than the checkpoint needs.

    The mean and standard deviation of the pixels are always compared. The positions of the stride, the anchors and
    RoIAlign's cells are compared if `config_model` has a field for them. The box coders are compared when weights
    are loaded, because they concern single layers.

    Args:
        config_model: a `config.model`, anything with nested `get`.
        provenance: conventions of the loaded checkpoint.

    Raises:
        WeightFileError: names each field and the value to set.
    """
    wanted = {
        "pixel_mean": provenance.pixel_mean,
        "pixel_std": provenance.pixel_std,
        "backbone.stride_in_1x1": provenance.stride_in_1x1,
        "rpn.anchor_offset": provenance.anchor_offset,
        "box_pooler.aligned": provenance.aligned_pooling,
        "mask_pooler.aligned": provenance.aligned_pooling,
    }
    wrong = []
    for field, value in wanted.items():
        found = _lookup(config_model, field)
        if value is None or found is None:
            continue
        if not np.allclose(found, value, rtol=0, atol=1e-2):
            wrong.append(f"config.model.{field} = {value!r} (it is {found!r})")
    if wrong:
        raise WeightFileError(f"The {provenance.source} weights need {'; '.join(wrong)}; set these values.")


def _lookup(config: Any, field: str) -> Any:
    for key in field.split("."):
        config = None if config is None else config.get(key)
    return config
