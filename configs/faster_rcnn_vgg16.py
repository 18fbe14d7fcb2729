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

# By data set: images shown, sides of a cell's square anchors (scales times the stride of 16), and dropout.
SETS = {
    "coco": (2 * 490_000, (64.0, 128.0, 256.0, 512.0), 0.0),
    "voc": (2 * 70_000, (128.0, 256.0, 512.0), 0.5),
}


def py_faster_rcnn(variant: dict, *, data: str, resolution: int) -> ml_collections.ConfigDict:
    """Returns what py-faster-rcnn's networks share: one feature map of stride 16, RoIPool, images of 600 pixels."""
    config = common.base(variant)
    config.data.update(short_side=600, long_side=1000, canvases=common.CANVASES[600, 1000])
    if data == "coco":
        config.data.update(train_split="train2014", eval_split="val2014", mask_size=0, skip_empty_boxes=True)
    else:
        config.data.update(name="voc", train_split="2007_trainval", eval_split="2007_test", max_gt=64)
        config.data.class_names = ()
    config.model.fpn = None
    config.model.rpn.update(
        levels=(4,),
        anchor_sizes=(SETS[data][1],),
        anchor_offset=0.5,
        min_size=16.0,
        pre_nms_topk=(12000, 6000),
        post_nms_topk=(2000, 300),
    )
    config.model.roi_heads.batch_size_per_image = 128
    config.model.iou_head.batch_size_per_image = 128
    pooler = dict(method="max", levels=(4,), resolution=resolution)
    config.model.box_pooler, config.model.mask_pooler = pooler, pooler
    config.optimizer.update(decay_at=(5.0 / 7.0,), weight_decay=5e-4)
    config.train.save_every = 2500
    config.postprocess.nms_threshold = 0.3
    return config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(
        arg,
        **common.VARIANT,
        data="coco",
        weights="detectron",
        multi_scale=False,
        legacy="none",
        batch_size=8,
    )
    images, _, dropout_rate = common.choose(SETS, variant, "data")
    config = py_faster_rcnn(variant, data=variant["data"], resolution=7)
    config.model.update(common.choose(common.PIXELS, variant, "weights"))
    config.model.backbone = dict(name="vgg16")
    config.model.rpn.features = 512
    config.model.box_head = dict(name="vgg", features=(4096, 4096), dropout_rate=dropout_rate)
    common.set_legacy(config, variant)
    config.optimizer.learning_rate = 0.008  # 0.001 for 2 images
    config.optimizer.frozen = tuple(f"backbone/conv{layer}" for layer in ("1_1", "1_2", "2_1", "2_2"))
    common.set_schedule(config, variant, images=images)
    return config
