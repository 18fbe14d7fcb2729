"""What a checkpoint's network was trained under that its tensors do not say."""

import dataclasses
from typing import Any, Literal

import numpy as np

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights.restricted_unpickler import WeightFileError

BoxCoder = CornerBoxCoder | CenterBoxCoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """The conventions of a checkpoint, beside its tensors.

    Attributes:
        source: the code that wrote it.
        pixel_mean, pixel_std: of the channels in RGB order, 0 to 255, whatever the order of the file.
        channel_order: of the images the file's network read. The first convolution of a 'bgr' file is flipped
            when it is loaded, so that ours reads RGB.
        stride_in_1x1: a bottleneck strides in its first 1x1 convolution (the original ResNet of MSRA) and not
            in its 3x3 one; None for other backbones.
        box_coder: of the box head; None for a file of a backbone.
        rpn_box_coder: of the anchors; None for a file of a backbone.
        anchor_offset: where an anchor stands in its cell, in cells; None for a file of a backbone.
        aligned_pooling: cell `i` of a feature map has its centre at `i + 0.5` for RoIAlign, and not at `i`;
            None for a file of a backbone.
        plus_one_widths: a box is `x2 - x1 + 1` wide. With `x2` moved by one pixel to the outer edge both coders
            are those of continuous edges; a RoI is then pooled from a region one pixel shorter.
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
    """Raises where a model is configured for other inputs than the checkpoint needs.

    The mean and standard deviation of the pixels are always compared; the place of the stride, of the anchors
    and of RoIAlign's cells where `config_model` has a field for it. The box coders are compared when weights
    are loaded, for they concern single layers.

    Args:
        config_model: a `config.model`, anything with nested `get`.
        provenance: of the loaded checkpoint.

    Raises:
        WeightFileError: naming each field and the value to set.
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
        raise WeightFileError(f"The {provenance.source} weights need {'; '.join(wrong)}; set what they need.")


def _lookup(config: Any, field: str) -> Any:
    for key in field.split("."):
        config = None if config is None else config.get(key)
    return config
