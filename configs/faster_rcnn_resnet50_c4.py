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

# Images shown by each schedule, in batches of 8.
IMAGES = {"1x": 8 * 180_000, "2x": 8 * 360_000}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(arg, **common.VARIANT, **common.RESNET_VARIANT, batch_size=8)
    config = common.base(variant)
    config.data.update(mask_size=0, skip_empty_boxes=True)
    config.model.backbone.out_stages = ("res4",)
    config.model.fpn = None
    config.model.rpn.update(
        features=1024,
        levels=(4,),
        anchor_sizes=((32.0, 64.0, 128.0, 256.0, 512.0),),
        anchor_offset=0.5,
        pre_nms_topk=(12000, 6000),
    )
    common.update_poolers(config, levels=(4,), resolution=14)
    common.set_resnet_weights(config, variant)
    stride_in_1x1 = config.model.backbone.stride_in_1x1
    config.model.box_head = dict(name="res5", blocks=3, features=2048, stride_in_1x1=stride_in_1x1)
    common.set_schedule(config, variant, images=common.choose(IMAGES, variant, "schedule"))
    return config
