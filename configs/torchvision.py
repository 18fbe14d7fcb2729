"""torchvision's Faster and Mask R-CNN with ResNet-50-FPN, field by field: `make parity` shows that they are equal.

    python -m klbox_jax.main --config=configs/torchvision.py:model=maskrcnn_resnet50_fpn \
        --config.data.root=path/to/coco --config.model.init_weights=path/to/resnet50.pth \
        --workdir=runs/maskrcnn --mode=train_and_eval

Fields of the network and of the post-processing are torchvision 0.29's defaults; the schedule is that of its
detection references (16 images a step, 26 epochs). Its heads have 91 outputs with the background, one for each
of COCO's ids up to 90: `build_model(config.model, num_classes=90)`. The canvases are multiples of 64, for which
torchvision's anchors have equal strides on every level; it pads to multiples of 32. Not torchvision's: images
shrink by area averaging, mask targets are 0 or 1, and biases have no weight decay.
"""

import ml_collections

from configs import common

# By model: whether it has masks.
MODELS = {"fasterrcnn_resnet50_fpn": False, "maskrcnn_resnet50_fpn": True}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    has_masks = common.choose(MODELS, common.parse_arg(arg, model="fasterrcnn_resnet50_fpn"), "model")
    config = common.base(dict(loss="smooth_l1", suppression="hard", voting="none", iou_head=False))
    config.data.update(
        canvases=((832, 1088), (1088, 832), (832, 1344), (1344, 832)),
        mask_size=112 if has_masks else 0,
        skip_empty_boxes=True,
    )
    config.model.box_loss_settings.smooth_l1_beta = 1.0 / 9.0
    config.model.backbone.stride_in_1x1 = False
    config.model.rpn.update(
        anchor_offset=0.0, round_anchors=True, box_coder="center", min_size=1e-3, smooth_l1_beta=1.0 / 9.0
    )
    config.model.roi_heads.update(
        box_coder="center", box_coder_weights=(10.0, 10.0, 5.0, 5.0), iou_threshold=0.5
    )
    common.update_poolers(config, aligned=False)
    config.model.mask_head.enabled = has_masks
    config.model.update(common.PIXELS["torchvision"])
    config.optimizer.update(warmup_steps=1000, warmup_factor=0.001, decay_at=(16.0 / 26.0, 22.0 / 26.0))
    # Three of the five parts are trained, as torchvision does when it starts from ImageNet weights.
    config.optimizer.frozen = ("backbone/stem", "backbone/res2_0", "backbone/res2_1", "backbone/res2_2")
    config.train.update(num_epochs=26.0, save_every=1000, log_every=50)
    # All candidates that can pass the threshold: at most 19 probabilities of a proposal are above 0.05.
    config.postprocess.pre_nms_topk = 19000
    return config
