"""From a config to a detector. Config keys are the names of the constructor arguments they feed."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.models.box_head import BoxHead
from klbox_jax.models.fpn import FPN
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.models.iou_head import IoUHead
from klbox_jax.models.mask_head import MaskHead
from klbox_jax.models.mobilenet import MobileNetV2
from klbox_jax.models.resnet import BottleneckResNet, Res5Head
from klbox_jax.models.roi_heads import RoIHeads
from klbox_jax.models.rpn import RPN
from klbox_jax.models.small_resnet import ResNet
from klbox_jax.models.vgg import VGG16, VGGCNNM1024, VGGBoxHead
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.roi_pooler import RoIPooler

BACKBONES: dict[str, type[nn.Module]] = {
    "resnet": ResNet,
    "bottleneck_resnet": BottleneckResNet,
    "mobilenet_v2": MobileNetV2,
    "vgg16": VGG16,
    "vgg_cnn_m_1024": VGGCNNM1024,
}
BOX_HEADS: dict[str, type[nn.Module]] = {"two_mlp": BoxHead, "res5": Res5Head, "vgg": VGGBoxHead}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BOX_CODERS = {"corner": CornerBoxCoder, "center": CenterBoxCoder}


def _choose(choices: dict, key: str, field: str):
    if key not in choices:
        raise ValueError(
            f"config.model.{field} = {key!r} is unknown; choose one of {', '.join(sorted(choices))}"
        )
    return choices[key]


def build_model(config: Any, *, num_classes: int) -> GeneralizedRCNN:
    """Returns the detector that `config` (a `config.model`) describes, for `num_classes` classes.

    Backbone, pyramid and heads compute in `config.dtype`. Parameters, statistics of norms, what the heads
    answer, boxes and losses are float32 either way.

    Raises:
        ValueError: a field names something unknown, or asks for variances of a coder that has none.
    """
    backbone = config.backbone.to_dict()
    dtype = _choose(DTYPES, config.dtype, "dtype")
    return GeneralizedRCNN(
        backbone=_choose(BACKBONES, backbone.pop("name"), "backbone.name")(**backbone, dtype=dtype),
        fpn=FPN(**config.fpn, dtype=dtype) if config.fpn else None,
        rpn=_build_rpn(config, dtype),
        roi_heads=_build_roi_heads(config, dtype, num_classes=num_classes),
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


def _build_rpn(config: Any, dtype: DTypeLike) -> RPN:
    fields = config.rpn.to_dict()
    if "box_coder" in fields:
        coder = _choose(BOX_CODERS, fields["box_coder"], "rpn.box_coder")
        fields["box_coder"] = coder(weights=(1.0, 1.0, 1.0, 1.0))
    return RPN(**fields, dtype=dtype)


def _build_roi_heads(config: Any, dtype: DTypeLike, *, num_classes: int) -> RoIHeads:
    fields = config.roi_heads.to_dict()
    coder_name = fields.pop("box_coder")
    coder = _choose(BOX_CODERS, coder_name, "roi_heads.box_coder")
    box_loss = BoxLoss(name=config.box_loss, **config.box_loss_settings)
    if box_loss.has_variances and coder_name != "corner":
        raise ValueError(
            f"config.model.box_loss = {config.box_loss!r} predicts the variance of each edge and needs "
            "config.model.roi_heads.box_coder = 'corner'"
        )
    box_head = config.box_head.to_dict()
    if config.mask_head.enabled:
        mask_head = config.mask_head.to_dict()
        del mask_head["enabled"]
        fields |= {
            "mask_head": MaskHead(num_classes=num_classes, **mask_head, dtype=dtype),
            "mask_pooler": RoIPooler(**config.mask_pooler),
        }
    iou = config.iou_head
    if iou.enabled:
        fields |= {
            "iou_head": IoUHead(
                num_classes=num_classes,
                class_agnostic=fields["class_agnostic"],
                features=iou.features,
                dtype=dtype,
            ),
            # The pyramid levels of the box head, pooled so that the result is smooth in the box.
            "iou_pooler": RoIPooler(**(config.box_pooler.to_dict() | {"method": "precise"})),
            "iou_batch_size_per_image": iou.batch_size_per_image,
            "iou_loss_weight": iou.loss_weight,
        }
    return RoIHeads(
        num_classes=num_classes,
        box_loss=box_loss,
        box_pooler=RoIPooler(**config.box_pooler),
        box_head=_choose(BOX_HEADS, box_head.pop("name"), "box_head.name")(**box_head, dtype=dtype),
        box_coder=coder(weights=fields.pop("box_coder_weights")),
        **fields,
    )
