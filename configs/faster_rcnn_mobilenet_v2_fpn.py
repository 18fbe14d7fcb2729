"""Faster R-CNN with MobileNetV2-FPN (strides 4 to 64), for photographs on a laptop.

    klbox train runs/aquarium_kl --config=faster_rcnn_mobilenet_v2_fpn --config.data.root=path/to/aquarium \
        --config.model.init_weights=path/to/mobilenet_v2.pth

Measured on the Aquarium photographs, mean of seeds 0 to 4, 27 minutes of training on one CPU core: AP 27.3, AP80 12.2;
`loss=smooth_l1,suppression=hard`: AP 26.0, AP80 9.7. The backbone starts from torchvision's ImageNet weights.
The layout of the folder is found (COCO, Roboflow, VOC or YOLO); `data=coco`, `voc`, `yolo` or `tfds` says it.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(arg, **common.VARIANT, data="auto")
    config = common.base(variant)
    kinds = ("auto", "coco", "voc", "yolo", "tfds")
    config.data.name = common.choose({name: name for name in kinds}, variant, "data")
    config.data.update(train_split="train", eval_split="valid", max_gt=64, num_threads=2)
    config.data.update(short_side=320, long_side=448, canvases=((320, 448), (448, 320), (384, 384)))
    # A network soon memorizes a few hundred photographs, and its sigma is then that of the training images.
    config.data.scale_jitter = (0.6, 1.0)
    config.data.update(mask_size=0, skip_empty_boxes=False, class_names=(), tfds_name="")
    # Until the learning rate first falls: the mean learns as under smooth L1 while sigma is not worth much yet.
    # Three quarters of the steps on Aquarium; `klbox train` takes three quarters of those on other data.
    config.model.box_loss_settings.ramp_steps = 684
    config.model.backbone = dict(name="mobilenet_v2")
    config.model.fpn.features = 64
    config.model.rpn.update(
        features=64,
        levels=(3, 4, 5, 6),
        anchor_sizes=((16.0, 23.0), (32.0, 45.0), (64.0, 90.0), (128.0, 256.0)),
        pre_nms_topk=(400, 500),
        post_nms_topk=(512, 512),
        nms_threshold=0.85,  # more candidates to vote with, as on the scenes
    )
    config.model.roi_heads.batch_size_per_image = 128
    common.update_poolers(config, canonical_box_size=112.0)
    config.model.box_head.features = 512
    config.model.iou_head.update(features=512, batch_size_per_image=128)
    config.model.update(common.PIXELS["torchvision"])
    config.optimizer.update(name="adamw", learning_rate=6e-4, weight_decay=0.05, clip_norm=10.0)
    config.optimizer.update(warmup_steps=100, warmup_factor=0.001, decay_at=(0.75, 0.92))
    # The stages of stride 2 and 4 keep their ImageNet weights, as in torchvision's detectors.
    config.optimizer.frozen = ("backbone/stem", "backbone/block_1", "backbone/block_2", "backbone/block_3")
    config.train.update(batch_size=8, num_epochs=16.0, save_every=56, log_every=10)
    config.postprocess.pre_nms_topk = 1000
    return config
