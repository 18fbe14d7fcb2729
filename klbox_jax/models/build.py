"""Builds a detector from a config. Config keys are the names of the constructor arguments that they set."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from klbox_jax.losses.box_loss import BOX_LOSSES, BoxLoss, LossFunction
from klbox_jax.models.box_head import BoxHead
from klbox_jax.models.box_predictor import BoxPredictor
from klbox_jax.models.fpn import FPN
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.models.iou_head import IoUHead
from klbox_jax.models.mask_head import MaskHead
from klbox_jax.models.mobilenet import MobileNetV2
from klbox_jax.models.resnet import BottleneckResNet, Res5Head
from klbox_jax.models.roi_heads import RoIHeads, RoISampling
from klbox_jax.models.rpn import RPN, AnchorSampling, ProposalSettings
from klbox_jax.models.small_resnet import ResNet
from klbox_jax.models.vgg import VGG16, VGGCNNM1024, VGGBoxHead
from klbox_jax.ops.anchors import AnchorGenerator
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.roi_pooler import RoIPooler

# A backbone takes `dtype` and the fields of `config.model.backbone`. It maps images to {"res2": map, "res3": map, ...}.
BACKBONES: dict[str, type[nn.Module]] = {
    "resnet": ResNet,
    "bottleneck_resnet": BottleneckResNet,
    "mobilenet_v2": MobileNetV2,
    "vgg16": VGG16,
    "vgg_cnn_m_1024": VGGCNNM1024,
}
# A box head takes `dtype` and the fields of `config.model.box_head`; see `RoIHeads.box_head`.
BOX_HEADS: dict[str, type[nn.Module]] = {"two_mlp": BoxHead, "res5": Res5Head, "vgg": VGGBoxHead}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BOX_CODERS = {"corner": CornerBoxCoder, "center": CenterBoxCoder}


def build_model(
    config: Any,
    *,
    num_classes: int,
    backbones: Mapping[str, type[nn.Module]] = BACKBONES,
    box_heads: Mapping[str, type[nn.Module]] = BOX_HEADS,
    box_losses: Mapping[str, LossFunction] = BOX_LOSSES,
) -> GeneralizedRCNN:
    """Returns the detector that `config` describes.

    Backbone, pyramid and heads compute in `config.dtype`. Parameters, statistics of norms, outputs of the heads, boxes
    and losses are always float32.

    Args:
        config: a `config.model`.
        num_classes: K, without the background.
        backbones: backbones by name. To use your own, pass `BACKBONES | {"mine": MyBackbone}`.
        box_heads: box heads by name.
        box_losses: box losses by name.

    Raises:
        ValueError: a field has an unknown name, or the box loss has variances and the box coder cannot code them.
    """
    backbone = config.backbone.to_dict()
    dtype = _choose(DTYPES, config.dtype, "dtype")
    return GeneralizedRCNN(
        backbone=_choose(backbones, backbone.pop("name"), "backbone.name")(**backbone, dtype=dtype),
        fpn=FPN(**config.fpn, dtype=dtype) if config.fpn else None,
        rpn=_build_rpn(config, dtype),
        roi_heads=_build_roi_heads(
            config, dtype, num_classes=num_classes, box_heads=box_heads, box_losses=box_losses
        ),
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


def _build_rpn(config: Any, dtype: DTypeLike) -> RPN:
    fields = config.rpn.to_dict()
    if "box_coder" in fields:
        coder = _choose(BOX_CODERS, fields["box_coder"], "rpn.box_coder")
        fields["box_coder"] = coder(weights=(1.0, 1.0, 1.0, 1.0))
    # Some keys have longer names than the fields of the anchor generator.
    names = {"anchor_sizes": "sizes", "anchor_offset": "offset", "round_anchors": "round_sizes"}
    fields |= {name: fields.pop(key) for key, name in names.items() if key in fields}
    anchor_generator = AnchorGenerator(
        strides=tuple(2**level for level in fields["levels"]), **_take(fields, AnchorGenerator)
    )
    # Pairs: the number in training and the number in evaluation.
    pre_nms_topk = fields.pop("pre_nms_topk", (2000, 1000))
    post_nms_topk = fields.pop("post_nms_topk", (1000, 1000))
    selection = _take(fields, ProposalSettings)
    train_proposals, eval_proposals = (
        ProposalSettings(pre_nms_topk=pre, post_nms_topk=post, **selection)
        for pre, post in zip(pre_nms_topk, post_nms_topk, strict=True)
    )
    return RPN(
        anchor_generator=anchor_generator,
        train_proposals=train_proposals,
        eval_proposals=eval_proposals,
        sampling=AnchorSampling(**_take(fields, AnchorSampling)),
        **fields,
        dtype=dtype,
    )


def _build_roi_heads(
    config: Any,
    dtype: DTypeLike,
    *,
    num_classes: int,
    box_heads: Mapping[str, type[nn.Module]],
    box_losses: Mapping[str, LossFunction],
) -> RoIHeads:
    fields = config.roi_heads.to_dict()
    sampling = RoISampling(**_take(fields, RoISampling))
    box_coder, weights = fields.pop("box_coder"), fields.pop("box_coder_weights")
    box_head = config.box_head.to_dict()
    box_predictor = BoxPredictor(
        num_classes=num_classes,
        box_loss=_build_box_loss(config, box_losses),
        box_coder=_choose(BOX_CODERS, box_coder, "roi_heads.box_coder")(weights=weights),
        **fields,
    )
    if box_predictor.box_loss.has_variances and box_coder != "corner":
        raise ValueError(
            f"config.model.box_loss = {config.box_loss!r} predicts the variance of each edge and needs "
            "config.model.roi_heads.box_coder = 'corner'"
        )
    return RoIHeads(
        box_pooler=RoIPooler(**config.box_pooler),
        box_head=_choose(box_heads, box_head.pop("name"), "box_head.name")(**box_head, dtype=dtype),
        box_predictor=box_predictor,
        sampling=sampling,
        mask_head=_build_mask_head(config, dtype, num_classes=num_classes),
        iou_head=_build_iou_head(config, dtype, box_predictor),
    )


def _build_box_loss(config: Any, box_losses: Mapping[str, LossFunction]) -> BoxLoss:
    loss = _choose(box_losses, config.box_loss, "box_loss")
    return BoxLoss(name=config.box_loss, loss=loss, **config.box_loss_settings)


def _build_mask_head(config: Any, dtype: DTypeLike, *, num_classes: int) -> MaskHead | None:
    fields = config.mask_head.to_dict()
    if not fields.pop("enabled"):
        return None
    pooler = RoIPooler(**config.mask_pooler)
    return MaskHead(num_classes=num_classes, pooler=pooler, **fields, dtype=dtype)


def _build_iou_head(config: Any, dtype: DTypeLike, box_predictor: BoxPredictor) -> IoUHead | None:
    fields = config.iou_head.to_dict()
    if not fields.pop("enabled"):
        return None
    return IoUHead(
        num_classes=box_predictor.num_classes,
        class_agnostic=box_predictor.class_agnostic,
        # The levels of the box head, with the pooling method that is smooth in the box.
        pooler=RoIPooler(**(config.box_pooler.to_dict() | {"method": "precise"})),
        **fields,
        dtype=dtype,
    )


def _choose(choices: Mapping, key: str, field: str):
    if key not in choices:
        raise ValueError(
            f"config.model.{field} = {key!r} is unknown; choose one of {', '.join(sorted(choices))}"
        )
    return choices[key]


def _take(fields: dict[str, Any], record: type) -> dict[str, Any]:
    """Removes the entries of `fields` that are fields of the dataclass `record`, and returns them."""
    names = {field.name for field in dataclasses.fields(record)} & fields.keys()
    return {name: fields.pop(name) for name in names}
