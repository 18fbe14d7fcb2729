"""Faster R-CNN with a small GroupNorm ResNet-FPN on the embedded scenes: the setting of `make table1`.

    python -m klbox_jax.main --config=configs/scenes.py:loss=kl,voting=variance,suppression=soft_gaussian \
        --workdir=runs/scenes_kl --mode=train_and_eval

Paper row: Table 1 of He et al. 2019 (VGG-16 on COCO), in miniature. Measured with seed 0 on two CPU cores, 263
seconds of training: AP 46.2 and AP90 15.5 with `loss=kl` as above, 43.1 and 8.0 with `loss=smooth_l1,suppression=hard`.

    noise_scale  factor on the label noise; 0 for exact labels
    size         full, or tiny: a few steps of a very small network, to try a program out in seconds
"""

import ml_collections

from configs import common

TINY = {
    "model.backbone": dict(
        name="resnet", stem_features=8, stage_features=(8, 8, 16), stage_blocks=(1, 1, 1), group_size=4
    ),
    "model.fpn": dict(features=16, levels=(3, 4), extra_levels=0),
    "model.rpn.features": 16,
    "model.rpn.levels": (3, 4),
    "model.rpn.anchor_sizes": ((16.0, 26.0), (40.0, 60.0)),
    "model.rpn.pre_nms_topk": (64, 32),
    "model.rpn.post_nms_topk": (48, 32),
    "model.rpn.batch_size_per_image": 32,
    "model.box_head.features": 32,
    "model.box_pooler.resolution": 4,
    "model.roi_heads.batch_size_per_image": 16,
    "model.iou_head.features": 16,
    "model.iou_head.batch_size_per_image": 8,
    "postprocess.pre_nms_topk": 64,
    "postprocess.detections_per_image": 20,
    # A network of so few steps has low scores, and there should be detections.
    "postprocess.score_threshold": 0.0,
    "data.num_images": dict(train=24, validation=8, calibration=8, test=8),
    "train.batch_size": 4,
    "train.num_steps": 6,
    "train.save_every": 3,
    "train.log_every": 1,
    "evaluation.batch_size": 4,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(arg, **common.VARIANT, noise_scale=1.0, size="full")
    config = common.base(variant)
    config.data.update(
        name="scenes", train_split="train", eval_split="validation", calibration_split="calibration"
    )
    config.data.update(short_side=192, long_side=192, canvases=((192, 192),), max_gt=8, num_threads=2)
    config.data.update(mask_size=0, noise_scale=variant["noise_scale"])
    config.data.num_images = dict(train=4000, validation=500, calibration=500, test=500)
    config.model.backbone = dict(
        name="resnet", stem_features=24, stage_features=(24, 48, 96, 128), stage_blocks=(1,) * 4, group_size=8
    )
    config.model.fpn.update(features=48, levels=(3, 4, 5), extra_levels=0)
    config.model.rpn.update(
        features=32,
        levels=(3, 4, 5),
        anchor_sizes=((16.0, 26.0), (40.0, 60.0), (84.0, 112.0)),
        pre_nms_topk=(200, 400),
        post_nms_topk=(160, 300),
        nms_threshold=0.85,  # high, so that every object keeps several proposals: they are the voters
        iou_thresholds=(0.3, 0.6),
        batch_size_per_image=64,
    )
    config.model.roi_heads.update(class_agnostic=True, batch_size_per_image=48, positive_fraction=0.5)
    common.update_poolers(config, levels=(3,), canonical_box_size=96.0)
    config.model.box_head.features = 192
    config.model.iou_head.update(features=192, batch_size_per_image=48)
    config.model.update(pixel_mean=(127.5, 127.5, 127.5), pixel_std=(64.0, 64.0, 64.0))
    config.optimizer.update(name="adamw", learning_rate=3e-3, weight_decay=0.01, clip_norm=10.0, frozen=())
    config.optimizer.update(warmup_steps=100, warmup_factor=0.1, decay_at=(0.6, 0.8, 0.93), decay_factor=0.3)
    config.train.update(batch_size=8, num_epochs=6.25, save_every=250, log_every=25)
    config.evaluation.batch_size = 20
    config.postprocess.update(pre_nms_topk=400, detections_per_image=50)
    config.update_from_flattened_dict(common.choose({"full": {}, "tiny": TINY}, variant, "size"))
    return config
