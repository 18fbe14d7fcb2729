"""Faster R-CNN with a small GroupNorm ResNet-FPN on the embedded scenes: the setting of `make table1`.

    python -m klbox_jax.main --config=configs/scenes.py:loss=kl,voting=variance,suppression=soft_gaussian \
        --workdir=runs/scenes_kl --mode=train_and_eval

Paper row: Table 1 of He et al. 2019 (VGG-16 on COCO), in miniature. Measured with seed 0 on two CPU cores, 263
seconds of training: AP 46.2 and AP90 15.5 with `loss=kl` as above, 43.1 and 8.0 with `loss=smooth_l1,suppression=hard`.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(
        arg, loss="kl", suppression="soft_gaussian", voting="", iou_head=False, noise_scale=1.0
    )
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = common.scenes_data(noise_scale=variant["noise_scale"])
    config.model = dict(
        box_loss=variant["loss"],
        box_loss_settings=common.box_loss_settings(),
        dtype="float32",  # of the activations, or "bfloat16"
        init_weights="",
        init_partial=False,
        backbone=dict(
            name="resnet",
            stem_features=24,
            stage_features=(24, 48, 96, 128),
            stage_blocks=(1, 1, 1, 1),
            group_size=8,
        ),
        fpn=dict(features=48, levels=(3, 4, 5), extra_levels=0),
        rpn=dict(
            features=32,
            levels=(3, 4, 5),
            anchor_sizes=((16.0, 26.0), (40.0, 60.0), (84.0, 112.0)),
            aspect_ratios=(0.5, 1.0, 2.0),
            pre_nms_topk=(200, 400),
            post_nms_topk=(160, 300),
            # Mild, so that every object keeps several proposals: they are the voters.
            nms_threshold=0.85,
            iou_thresholds=(0.3, 0.6),
            batch_size_per_image=64,
            positive_fraction=0.5,
        ),
        roi_heads=dict(
            box_coder="corner",
            box_coder_weights=(10.0, 10.0, 10.0, 10.0),
            class_agnostic=True,
            batch_size_per_image=48,
            positive_fraction=0.5,
            box_loss_weight=1.0,
        ),
        box_pooler=dict(
            method="align",
            levels=(3,),
            resolution=7,
            sampling_ratio=2,
            canonical_box_size=96.0,
            canonical_level=4,
        ),
        box_head=dict(name="two_mlp", features=192),
        mask_head=common.mask_head(enabled=False),
        mask_pooler=dict(
            method="align",
            levels=(3,),
            resolution=14,
            sampling_ratio=2,
            canonical_box_size=96.0,
            canonical_level=4,
        ),
        iou_head=common.iou_head(
            enabled=variant["iou_head"],
            features=192,
            batch_size_per_image=48,
            loss_weight=1.0,
        ),
        pixel_mean=(127.5, 127.5, 127.5),
        pixel_std=(64.0, 64.0, 64.0),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-3,
        warmup_steps=100,
        warmup_factor=0.1,
        decay_at=(0.6, 0.8, 0.93),
        decay_factor=0.3,
        weight_decay=0.01,
        momentum=0.9,
        clip_norm=10.0,
        frozen=(),
    )
    config.train = common.train(batch_size=8, num_epochs=6.25, save_every=250, log_every=25)
    config.evaluation = common.evaluation(batch_size=20)
    config.predict = common.predict()
    config.calibrate = common.calibrate()
    config.export = common.export()
    config.postprocess = common.postprocess(
        loss=variant["loss"],
        suppression=variant["suppression"],
        voting=variant["voting"],
        pre_nms_topk=400,
        detections_per_image=50,
    )
    return config
