"""Faster R-CNN with VGG-16, the paper's ablation, on COCO or VOC 2007, under py-faster-rcnn's hyper-parameters.

    python -m klbox_jax.main --config=configs/faster_rcnn_vgg16.py:loss=kl,voting=variance,suppression=soft_gaussian \
        --config.data.root=path/to/coco --config.model.init_weights=path/to/VGG16.pkl \
        --workdir=runs/vgg16_kl --mode=train_and_eval

Paper rows: Table 1 (He et al. 2019), COCO AP of the baseline 23.6 and with KL Loss, soft-NMS and voting 29.1, both from
the abstract; KL Loss alone 26.4, quoted second-hand; the other rows unverified. With `data=voc`, Table 6: VOC 2007 mAP
of the full method 71.6 (a public result listing). Ours: not run yet. Hardware of the paper: 4 GPUs (unverified).

    data        coco or voc (trainval and test of 2007)
    weights     detectron (VGG16.pkl, made from Caffe's) or torchvision (its ImageNet .pth); sets the pixels
    legacy      none, or detectron: the habits of the released code, for its weights (docs/legacy.md)
    batch_size  of all devices together; the number of steps and the learning rate follow it

From py-faster-rcnn's end-to-end training: 490k steps of 2 images on COCO (70k on VOC), a tenth of the rate after 5/7 of
them, anchors of 4 (3) scales, 128 RoIs, RoIPool, frozen conv1 and conv2, dropout on VOC and none on COCO, NMS at
0.3. The paper's splits of COCO, train2014 and val2014, are unverified.

Ours: batches of 8, whose rate is 4 times that of 2 (the linear rule); a warm-up of 500 steps; one objectness logit for
each anchor instead of two; corner coding with weights 10; proposals of less than 16 pixels of the canvas dropped,
where py-faster-rcnn's 16 are scaled with the image; weight decay leaves biases out; at most 2000 candidates
enter NMS; 100 detections of a VOC image, too; the canvases.
"""

import ml_collections

from configs import common

# Images shown, and the sides of a cell's square anchors: scales times the stride of 16.
SETS = {
    "coco": (2 * 490_000, (64.0, 128.0, 256.0, 512.0)),
    "voc": (2 * 70_000, (128.0, 256.0, 512.0)),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(
        arg,
        loss="kl",
        suppression="soft_gaussian",
        voting="",
        iou_head=False,
        data="coco",
        weights="detectron",
        multi_scale=False,
        legacy="none",
        batch_size=8,
    )
    images, anchor_sizes = common.choose(SETS, variant, "data")
    pixel_mean, pixel_std, _ = common.choose(common.IMAGENET_WEIGHTS, variant, "weights")
    legacy = common.choose(common.LEGACY, variant, "legacy")
    config = ml_collections.ConfigDict()
    config.seed = 0
    if variant["data"] == "coco":
        config.data = common.coco_data(
            size=(600, 1000), splits=("train2014", "val2014"), multi_scale=variant["multi_scale"]
        )
    else:
        config.data = common.voc_data(multi_scale=variant["multi_scale"])
    pooler = dict(method="max", levels=(4,), resolution=7, plus_one_widths=legacy)
    config.model = dict(
        box_loss=variant["loss"],
        box_loss_settings=common.box_loss_settings(),
        dtype="float32",  # of the activations, or "bfloat16"
        init_weights="",
        init_partial=False,
        backbone=dict(name="vgg16"),
        fpn=None,
        rpn=dict(
            features=512,
            levels=(4,),
            anchor_sizes=(anchor_sizes,),
            aspect_ratios=(0.5, 1.0, 2.0),
            anchor_offset=0.5,
            min_size=16.0,
            pre_nms_topk=(12000, 6000),
            post_nms_topk=(2000, 300),
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
            batch_size_per_image=128,
            positive_fraction=0.25,
            box_loss_weight=1.0,
        ),
        box_pooler=dict(pooler),
        box_head=dict(
            name="vgg", features=(4096, 4096), dropout_rate=0.0 if variant["data"] == "coco" else 0.5
        ),
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
        learning_rate=0.008,  # 0.001 for 2 images
        warmup_steps=500,
        warmup_factor=1.0 / 3.0,
        decay_at=(5.0 / 7.0,),
        decay_factor=0.1,
        weight_decay=5e-4,
        momentum=0.9,
        clip_norm=0.0,
        frozen=("backbone/conv1_1", "backbone/conv1_2", "backbone/conv2_1", "backbone/conv2_2"),
    )
    config.train = common.train(
        batch_size=variant["batch_size"],
        num_steps=common.steps_for(images, batch_size=variant["batch_size"]),
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
        legacy=legacy,
    )
    config.postprocess.nms_threshold = 0.3
    return config
