"""Faster R-CNN with MobileNetV2-FPN (strides 4 to 64), for photographs on a laptop.

    python -m klbox_jax.main --config=configs/faster_rcnn_mobilenet_v2_fpn.py:data=coco \
        --config.data.root=path/to/aquarium --config.model.init_weights=path/to/mobilenet_v2.pth \
        --workdir=runs/aquarium_kl --mode=train_and_eval

Measured on the Aquarium photographs, mean of seeds 0 to 4, 27 minutes of training on one CPU core: AP 27.3, AP80 12.2;
`loss=smooth_l1,suppression=hard`: AP 26.0, AP80 9.7. The backbone starts from torchvision's ImageNet weights.
`data=coco` reads a folder in COCO's layout.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(
        arg, loss="kl", suppression="soft_gaussian", voting="", iou_head=False, data="coco"
    )
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = dict(
        name=common.choose({name: name for name in ("coco", "voc", "tfds")}, variant, "data"),
        root="",
        train_split="train",
        eval_split="valid",
        calibration_split="",  # neither trained on nor reported; used where hold_out is 0
        hold_out=0.0,  # share of the training images kept out of it, to calibrate on
        short_side=320,
        long_side=448,
        canvases=((320, 448), (448, 320), (384, 384)),
        max_gt=64,
        flip=True,
        # A few hundred photographs are soon known by heart, and sigma is then that of the training images.
        scale_jitter=(0.6, 1.0),
        num_threads=2,
        on_bad_record="stop",  # or skip: images that are at fault or unreadable
        mask_size=0,
        skip_empty_boxes=False,  # of coco
        class_names=(),  # of voc, where they are not VOC's
        tfds_name="",  # of tfds, such as voc/2007
    )
    config.model = dict(
        box_loss=variant["loss"],
        # Until the learning rate first falls: the mean learns as under smooth L1 while sigma is not worth much yet.
        box_loss_settings=common.box_loss_settings(ramp_steps=684),
        dtype="float32",  # of the activations, or "bfloat16"
        init_weights="",
        init_partial=False,
        backbone=dict(name="mobilenet_v2"),
        fpn=dict(features=64, levels=(2, 3, 4, 5), extra_levels=1),
        rpn=dict(
            features=64,
            levels=(3, 4, 5, 6),
            anchor_sizes=((16.0, 23.0), (32.0, 45.0), (64.0, 90.0), (128.0, 256.0)),
            aspect_ratios=(0.5, 1.0, 2.0),
            pre_nms_topk=(400, 500),
            post_nms_topk=(512, 512),
            nms_threshold=0.85,  # more candidates to vote with, as on the scenes
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
        box_pooler=dict(
            method="align",
            levels=(2, 3, 4, 5),
            resolution=7,
            sampling_ratio=2,
            canonical_box_size=112.0,
            canonical_level=4,
        ),
        box_head=dict(name="two_mlp", features=512),
        mask_head=common.mask_head(enabled=False),
        mask_pooler=dict(
            method="align",
            levels=(2, 3, 4, 5),
            resolution=14,
            sampling_ratio=2,
            canonical_box_size=112.0,
            canonical_level=4,
        ),
        iou_head=common.iou_head(
            enabled=variant["iou_head"],
            features=512,
            batch_size_per_image=128,
            loss_weight=1.0,
        ),
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=6e-4,
        warmup_steps=100,
        warmup_factor=0.001,
        decay_at=(0.75, 0.92),
        decay_factor=0.1,
        weight_decay=0.05,
        momentum=0.9,
        clip_norm=10.0,
        # The stages of stride 2 and 4 keep their ImageNet weights, as torchvision's detectors do.
        frozen=("backbone/stem", "backbone/block_1", "backbone/block_2", "backbone/block_3"),
    )
    config.train = common.train(batch_size=8, num_epochs=16.0, save_every=56, log_every=10)
    config.evaluation = common.evaluation(batch_size=8)
    config.predict = common.predict()
    config.calibrate = common.calibrate()
    config.export = common.export()
    config.postprocess = common.postprocess(
        loss=variant["loss"],
        suppression=variant["suppression"],
        voting=variant["voting"],
        pre_nms_topk=1000,
        detections_per_image=100,
    )
    return config
