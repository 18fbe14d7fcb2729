"""torchvision's Faster and Mask R-CNN with ResNet-50-FPN, field by field: `make parity` shows that they are equal.

    python -m klbox_jax.main --config=configs/torchvision.py:model=maskrcnn_resnet50_fpn \
        --config.data.root=path/to/coco --config.model.init_weights=path/to/resnet50.pth \
        --workdir=runs/maskrcnn --mode=train_and_eval

Fields of the network and of the post-processing are torchvision 0.29's defaults; the schedule is that of its
detection references (16 images a step, 26 epochs). Its heads have 91 outputs with the background, one for each
of COCO's ids up to 90: `build_model(config.model, num_classes=90)`. The canvases are multiples of 64, of which
torchvision's anchors have equal strides on every level; it pads to multiples of 32. Not torchvision's: images
shrink by area averaging, mask targets are 0 or 1, and biases have no weight decay.
"""

import ml_collections

from configs import common

# Whether a model has masks.
MODELS = {"fasterrcnn_resnet50_fpn": False, "maskrcnn_resnet50_fpn": True}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    has_masks = common.choose(MODELS, common.parse_arg(arg, model="fasterrcnn_resnet50_fpn"), "model")
    pooling = dict(
        method="align",
        levels=(2, 3, 4, 5),
        sampling_ratio=2,
        canonical_box_size=224.0,
        canonical_level=4,
        aligned=False,
    )
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = common.coco_data(
        size=(800, 1333),
        splits=("train2017", "val2017"),
        multi_scale=False,
        mask_size=112 if has_masks else 0,
    ) | dict(canvases=((832, 1088), (1088, 832), (832, 1344), (1344, 832)))
    config.model = dict(
        box_loss="smooth_l1",
        box_loss_settings=common.box_loss_settings() | dict(smooth_l1_beta=1.0 / 9.0),
        dtype="float32",  # of the activations, or "bfloat16"
        init_weights="",
        init_partial=False,
        backbone=dict(name="bottleneck_resnet", stage_blocks=(3, 4, 6, 3), stride_in_1x1=False),
        fpn=dict(features=256, levels=(2, 3, 4, 5), extra_levels=1),
        rpn=dict(
            features=256,
            levels=(2, 3, 4, 5, 6),
            anchor_sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
            aspect_ratios=(0.5, 1.0, 2.0),
            anchor_offset=0.0,
            round_anchors=True,
            box_coder="center",
            min_size=1e-3,
            pre_nms_topk=(2000, 1000),
            post_nms_topk=(2000, 1000),
            nms_threshold=0.7,
            iou_thresholds=(0.3, 0.7),
            batch_size_per_image=256,
            positive_fraction=0.5,
            smooth_l1_beta=1.0 / 9.0,
        ),
        roi_heads=dict(
            box_coder="center",
            box_coder_weights=(10.0, 10.0, 5.0, 5.0),
            class_agnostic=False,
            batch_size_per_image=512,
            positive_fraction=0.25,
            iou_threshold=0.5,
            box_loss_weight=1.0,
        ),
        box_pooler=pooling | dict(resolution=7),
        box_head=dict(name="two_mlp", features=1024),
        mask_head=common.mask_head(enabled=has_masks, features=256, num_convs=4),
        mask_pooler=pooling | dict(resolution=14),
        iou_head=common.iou_head(enabled=False, features=1024, batch_size_per_image=512, loss_weight=1.0),
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
    )
    config.optimizer = dict(
        name="sgd",
        learning_rate=0.02,
        warmup_steps=1000,
        warmup_factor=0.001,
        decay_at=(16.0 / 26.0, 22.0 / 26.0),
        decay_factor=0.1,
        weight_decay=1e-4,
        momentum=0.9,
        clip_norm=0.0,
        # Three of the five parts are trained; so it is where torchvision starts from ImageNet weights.
        frozen=("backbone/stem", "backbone/res2_0", "backbone/res2_1", "backbone/res2_2"),
    )
    config.train = common.train(batch_size=16, num_epochs=26.0, save_every=1000, log_every=50)
    config.evaluation = common.evaluation(batch_size=8)
    config.predict = common.predict()
    config.calibrate = common.calibrate()
    config.export = common.export()
    config.postprocess = common.postprocess(
        loss="smooth_l1",
        suppression="hard",
        voting="none",
        # All that may pass the threshold: of a proposal's probabilities at most 19 are above 0.05.
        pre_nms_topk=19000,
        detections_per_image=100,
    )
    return config
