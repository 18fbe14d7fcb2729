"""Own parts of a user, passed to `build_model` as values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models.build import BACKBONES, BOX_HEADS, build_model
from klbox_jax.models.rpn import ProposalSettings
from klbox_jax.train.init_or_restore import dummy_batch
from tests.thin import random_batch, scenes_config


class Patches(nn.Module):
    """A backbone of one product for each stage."""

    width: int
    dtype: object = None

    @nn.compact
    def __call__(self, images):
        return {
            f"res{level}": nn.Conv(
                self.width, (2**level,) * 2, 2**level, dtype=self.dtype, name=f"stage{level}"
            )(images)
            for level in (3, 4)
        }


class MeanHead(nn.Module):
    """A box head without parameters."""

    dtype: object = None

    def __call__(self, pooled, key=None):
        return pooled.mean(axis=(1, 2))


def test_a_users_backbone_and_box_head():
    fields = {"model.backbone": {"name": "patches", "width": 8}, "model.box_head": {"name": "mean"}}
    config = scenes_config("loss=kl", **fields).model
    model = build_model(
        config,
        num_classes=3,
        backbones=BACKBONES | {"patches": Patches},
        box_heads=BOX_HEADS | {"mean": MeanHead},
    )
    batch = random_batch()
    params = jax.jit(lambda: model.init(jax.random.key(0), dummy_batch((64, 96)), method="init_all_heads"))()
    assert set(params["params"]["backbone"]) == {"stage3", "stage4"}
    assert set(params["params"]["roi_heads"]) == {"box_predictor"}
    losses = jax.jit(
        lambda params, batch: model.apply(params, batch, jax.random.key(1), method="train_forward").losses
    )(params, batch)
    assert all(np.isfinite(loss) for loss in losses.values())
    with pytest.raises(
        ValueError, match=r"backbone.name = 'patches' is unknown; choose one of bottleneck_resnet"
    ):
        build_model(config, num_classes=3)
    with pytest.raises(
        ValueError, match=r"box_head.name = 'mean' is unknown; choose one of res5, two_mlp, vgg"
    ):
        build_model(config, num_classes=3, backbones={"patches": Patches})


def test_the_flat_keys_of_the_rpn_reach_its_parts():
    fields = {
        "pre_nms_topk": (60, 30),
        "post_nms_topk": (40, 20),
        "nms_threshold": 0.6,
        "min_size": 3.0,
        "plus_one_widths": True,
        "iou_thresholds": (0.2, 0.8),
        "batch_size_per_image": 10,
        "positive_fraction": 0.25,
        "smooth_l1_beta": 0.5,
        "features": 12,
    }
    config = scenes_config("loss=kl", **{f"model.rpn.{name}": value for name, value in fields.items()})
    rpn = build_model(config.model, num_classes=3).rpn
    common = {"nms_threshold": 0.6, "min_size": 3.0, "plus_one_widths": True}
    assert rpn.train_proposals == ProposalSettings(pre_nms_topk=60, post_nms_topk=40, **common)
    assert rpn.eval_proposals == ProposalSettings(pre_nms_topk=30, post_nms_topk=20, **common)
    assert (rpn.sampling.iou_thresholds, rpn.sampling.batch_size_per_image) == ((0.2, 0.8), 10)
    assert rpn.sampling.positive_fraction == 0.25
    assert (rpn.smooth_l1_beta, rpn.features, rpn.levels) == (0.5, 12, (3, 4))
    assert (rpn.anchor_generator.sizes, rpn.anchor_generator.strides) == (
        config.model.rpn.anchor_sizes,
        (8, 16),
    )
    config.model.rpn.unlock()
    config.model.rpn.nms_treshold = 0.5
    with pytest.raises(TypeError, match="nms_treshold"):
        build_model(config.model, num_classes=3)


def test_the_heads_keys_reach_their_owners():
    fields = {
        "model.roi_heads.batch_size_per_image": 10,
        "model.roi_heads.positive_fraction": 0.5,
        "model.roi_heads.iou_threshold": 0.6,
        "model.roi_heads.box_loss_weight": 2.0,
        "model.roi_heads.class_agnostic": False,
        "model.roi_heads.box_coder_weights": (1.0, 2.0, 3.0, 4.0),
        "model.iou_head.loss_weight": 3.0,
        "model.mask_head": {"enabled": True, "features": 8, "num_convs": 1},
        "model.mask_pooler.resolution": 6,
    }
    config = scenes_config("loss=kl,iou_head=True", **fields).model
    heads = build_model(config, num_classes=3).roi_heads
    assert (heads.sampling.batch_size_per_image, heads.sampling.max_foreground) == (10, 5)
    assert heads.sampling.iou_threshold == 0.6
    predictor = heads.box_predictor
    assert (predictor.num_classes, predictor.class_agnostic, predictor.box_loss_weight) == (3, False, 2.0)
    assert heads.box_coder.weights == predictor.box_coder.weights == (1.0, 2.0, 3.0, 4.0)
    assert heads.box_loss.name == "kl"
    iou, mask = heads.iou_head, heads.mask_head
    assert (iou.loss_weight, iou.class_agnostic, iou.batch_size_per_image, iou.features) == (
        3.0,
        False,
        8,
        16,
    )
    assert (iou.pooler.method, iou.pooler.levels) == ("precise", heads.box_pooler.levels)
    assert (mask.num_classes, mask.features, mask.num_convs, mask.pooler.resolution) == (3, 8, 1, 6)
    assert jnp.float32 == iou.dtype == mask.dtype
