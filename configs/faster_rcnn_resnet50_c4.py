"""Faster R-CNN with ResNet-50-C4 on COCO: the last stage of the network is the box head ("conv5 head").

    python -m klbox_jax.main --config=configs/faster_rcnn_resnet50_c4.py:loss=kl,schedule=2x \
        --config.data.root=path/to/coco --config.model.init_weights=path/to/R-50.pkl \
        --workdir=runs/r50_c4_kl --mode=train_and_eval

Paper row: the conv5 head of table 3 (He et al. 2019), COCO val2017. Baseline 36.5 (Detectron's model zoo); with KL Loss
38.0, which follows from a gain of +1.5 that is quoted second-hand. Ours: not run yet. Hardware: 8 GPUs of 1 image.

    schedule    1x, 2x (180k and 360k steps of 8 images, Detectron's)
    init        imagenet, or detector: as in configs/faster_rcnn_resnet50_fpn.py
    weights     detectron (R-50.pkl of MSRA) or torchvision (its ImageNet .pth); sets pixels and strides
    legacy      none, or detectron: the habits of the released code, for its weights (docs/legacy.md)
    batch_size  of all devices together; the number of steps and the learning rate follow it

Schedule, learning rate, anchors and RoI counts are those of Detectron's e2e_faster_rcnn_R-50-C4_2x.yaml, and the
RPN has as many channels as the map it reads, 1024. Ours: RoIAlign takes 2 x 2 samples in each bin and, from imagenet,
is the aligned one; weight decay leaves biases and norms out; 2000 candidates at most enter NMS; the frozen layers
are detectron2's (stem and res2); the canvases.
"""

import ml_collections

from configs import common

# Images shown.
IMAGES = {"1x": 8 * 180_000, "2x": 8 * 360_000}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(
        arg,
        loss="kl",
        suppression="soft_gaussian",
        voting="",
        iou_head=False,
        schedule="2x",
        init="imagenet",
        weights="detectron",
        multi_scale=False,
        legacy="none",
        batch_size=8,
    )
    from_detector = common.choose({"imagenet": False, "detector": True}, variant, "init")
    pixel_mean, pixel_std, stride_in_1x1 = common.choose(common.IMAGENET_WEIGHTS, variant, "weights")
    legacy = common.choose(common.LEGACY, variant, "legacy")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = common.coco_data(
        size=(800, 1333), splits=("train2017", "val2017"), multi_scale=variant["multi_scale"]
    )
    pooler = dict(
        method="align",
        levels=(4,),
        resolution=14,
        sampling_ratio=2,
        canonical_box_size=224.0,
        canonical_level=4,
        aligned=not (from_detector or legacy),
        plus_one_widths=legacy,
    )
    config.model = dict(
        box_loss=variant["loss"],
        box_loss_settings=common.box_loss_settings(),
        dtype="float32",  # of the activations, or "bfloat16"
        init_weights="",
        init_partial=from_detector,
        backbone=dict(
            name="bottleneck_resnet",
            stage_blocks=(3, 4, 6, 3),
            stride_in_1x1=stride_in_1x1,
            out_stages=("res4",),
        ),
        fpn=None,
        rpn=dict(
            features=1024,
            levels=(4,),
            anchor_sizes=((32.0, 64.0, 128.0, 256.0, 512.0),),
            aspect_ratios=(0.5, 1.0, 2.0),
            anchor_offset=0.5,
            pre_nms_topk=(12000, 6000),
            post_nms_topk=(2000, 1000),
            nms_threshold=0.7,
            iou_thresholds=(0.3, 0.7),
            batch_size_per_image=256,
            positive_fraction=0.5,
            box_coder="corner" if legacy else "center",
            plus_one_widths=legacy,
        ),
        roi_heads=dict(
            box_coder="corner",
            box_coder_weights=(10.0, 10.0, 10.0, 10.0),
            class_agnostic=False,
            batch_size_per_image=512,
            positive_fraction=0.25,
            box_loss_weight=1.0,
        ),
        box_pooler=dict(pooler),
        box_head=dict(name="res5", blocks=3, features=2048, stride_in_1x1=stride_in_1x1),
        mask_head=common.mask_head(enabled=False),
        mask_pooler=dict(pooler),
        iou_head=common.iou_head(
            enabled=variant["iou_head"],
            features=1024,
            batch_size_per_image=512,
            loss_weight=1.0,
        ),
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    config.optimizer = dict(
        name="sgd",
        learning_rate=0.02,
        warmup_steps=500,
        warmup_factor=1.0 / 3.0,
        decay_at=(2.0 / 3.0, 8.0 / 9.0),
        decay_factor=0.1,
        weight_decay=1e-4,
        momentum=0.9,
        clip_norm=0.0,
        frozen=(
            "backbone/stem",
            "backbone/stem_norm",
            "backbone/res2_0",
            "backbone/res2_1",
            "backbone/res2_2",
        ),
    )
    config.train = common.train(
        batch_size=variant["batch_size"],
        num_steps=common.steps_for(
            common.choose(IMAGES, variant, "schedule"), batch_size=variant["batch_size"]
        ),
        save_every=5000,
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
        legacy=legacy,
    )
    return config
