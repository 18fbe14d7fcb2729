"""From a config to a detector. Config keys are the names of the constructor arguments they feed."""

from typing import Any

import flax.linen as nn

from klbox_jax.models.fpn import FPN
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.models.mobilenet import MobileNetV2
from klbox_jax.models.resnet import ResNet
from klbox_jax.models.roi_heads import RoIHeads
from klbox_jax.models.rpn import RPN
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder

BACKBONES: dict[str, type[nn.Module]] = {"resnet": ResNet, "mobilenet_v2": MobileNetV2}
BOX_CODERS = {"corner": CornerBoxCoder, "center": CenterBoxCoder}
BOX_LOSSES = ("smooth_l1", "kl")


def _choose(choices: dict, key: str, field: str):
    if key not in choices:
        raise ValueError(
            f"config.model.{field} = {key!r} is unknown; choose one of {', '.join(sorted(choices))}"
        )
    return choices[key]


def build_model(config: Any, *, num_classes: int) -> GeneralizedRCNN:
    """Returns the detector that `config` (a `config.model`) describes, for `num_classes` classes.

    Raises:
        ValueError: a field names something unknown, or asks for variances of a coder that has none.
    """
    backbone = config.backbone.to_dict()
    roi_heads = config.roi_heads.to_dict()
    coder_name = roi_heads.pop("box_coder")
    coder = _choose(BOX_CODERS, coder_name, "roi_heads.box_coder")
    if config.box_loss not in BOX_LOSSES:
        raise ValueError(
            f"config.model.box_loss = {config.box_loss!r} is unknown; choose one of {', '.join(BOX_LOSSES)}"
        )
    if config.box_loss != "smooth_l1" and coder_name != "corner":
        raise ValueError(
            f"config.model.box_loss = {config.box_loss!r} predicts the variance of each edge and needs "
            "config.model.roi_heads.box_coder = 'corner'"
        )
    return GeneralizedRCNN(
        backbone=_choose(BACKBONES, backbone.pop("name"), "backbone.name")(**backbone),
        fpn=FPN(**config.fpn),
        rpn=RPN(**config.rpn),
        roi_heads=RoIHeads(
            num_classes=num_classes,
            box_loss=config.box_loss,
            box_coder=coder(weights=roi_heads.pop("box_coder_weights")),
            **roi_heads,
        ),
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )
