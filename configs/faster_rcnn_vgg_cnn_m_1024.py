"""Faster R-CNN with VGG-CNN-M-1024 on VOC 2007, under py-faster-rcnn's hyper-parameters.

    python -m klbox_jax.main --config=configs/faster_rcnn_vgg_cnn_m_1024.py:loss=kl \
        --config.data.root=path/to/VOCdevkit --config.model.init_weights=path/to/VGG_CNN_M_1024.pkl \
        --workdir=runs/vgg_cnn_m_kl --mode=train_and_eval

Paper rows: the first half of Table 6 (He et al. 2019), VOC 2007 mAP; all of them unverified: baseline 60.4, KL Loss
62.0, with voting 62.8, with soft-NMS too 63.6. Ours: not run yet. Hardware of the paper: 4 GPUs (unverified).

`batch_size` is of all devices together; the number of steps and the learning rate follow it.

From py-faster-rcnn's end-to-end training: 70k steps of 1 image, a tenth of the rate after 5/7 of them, anchors of 3
scales, RPN of 256 channels, 128 RoIs, RoIPool of 6 x 6, frozen conv1, dropout, NMS at 0.3. Ours: batches of 4, whose
rate is 4 times that of 1 (the linear rule), and what configs/faster_rcnn_vgg16.py names.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(
        arg,
        loss="kl",
        suppression="soft_gaussian",
        voting="",
        iou_head=False,
        multi_scale=False,
        batch_size=4,
    )
    pixel_mean, pixel_std, _ = common.IMAGENET_WEIGHTS["detectron"]
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = common.voc_data(multi_scale=variant["multi_scale"])
    pooler = dict(method="max", levels=(4,), resolution=6)
    config.model = dict(
        box_loss=variant["loss"],
        box_loss_settings=common.box_loss_settings(),
        dtype="float32",  # of the activations, or "bfloat16"
        init_weights="",
        init_partial=False,
        backbone=dict(name="vgg_cnn_m_1024"),
        fpn=None,
        rpn=dict(
            features=256,
            levels=(4,),
            anchor_sizes=((128.0, 256.0, 512.0),),
            aspect_ratios=(0.5, 1.0, 2.0),
            anchor_offset=0.5,
            min_size=16.0,
            pre_nms_topk=(12000, 6000),
            post_nms_topk=(2000, 300),
            nms_threshold=0.7,
            iou_thresholds=(0.3, 0.7),
            batch_size_per_image=256,
            positive_fraction=0.5,
        ),
        roi_heads=dict(
            box_coder="corner",
            box_coder_weights=(10.0, 10.0, 10.0, 10.0),
            class_agnostic=False,
            batch_size_per_image=128,
            positive_fraction=0.25,
            box_loss_weight=1.0,
        ),
        box_pooler=dict(pooler),
        box_head=dict(name="vgg", features=(4096, 1024), dropout_rate=0.5),
        mask_head=common.mask_head(enabled=False),
        mask_pooler=dict(pooler),
        iou_head=common.iou_head(
            enabled=variant["iou_head"],
            features=1024,
            batch_size_per_image=128,
            loss_weight=1.0,
        ),
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    config.optimizer = dict(
        name="sgd",
        learning_rate=0.016,  # 0.001 for 1 image
        warmup_steps=500,
        warmup_factor=1.0 / 3.0,
        decay_at=(5.0 / 7.0,),
        decay_factor=0.1,
        weight_decay=5e-4,
        momentum=0.9,
        clip_norm=0.0,
        frozen=("backbone/conv1",),
    )
    config.train = common.train(
        batch_size=variant["batch_size"],
        num_steps=common.steps_for(70_000, batch_size=variant["batch_size"]),
        save_every=2500,
        log_every=20,
    )
    config.evaluation = common.evaluation(batch_size=8)
    config.predict = common.predict()
    config.calibrate = common.calibrate()
    config.export = common.export()
    config.postprocess = common.postprocess(
        loss=variant["loss"],
        suppression=variant["suppression"],
        voting=variant["voting"],
        pre_nms_topk=2000,
        detections_per_image=100,
    )
    config.postprocess.nms_threshold = 0.3
    return config
