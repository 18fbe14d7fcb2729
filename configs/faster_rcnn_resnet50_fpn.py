"""Faster R-CNN with ResNet-50-FPN or ResNet-101-FPN on COCO, under Detectron's hyper-parameters.

    python -m klbox_jax.main --config=configs/faster_rcnn_resnet50_fpn.py:loss=kl,schedule=2x,init=detector \
        --config.data.root=path/to/coco --config.model.init_weights=path/to/model_final.pkl \
        --workdir=runs/r50_fpn_kl --mode=train_and_eval

Paper row: R50-FPN Faster R-CNN (He et al. 2019, tables 3 and 5), COCO val2017. AP of the baseline 37.9, with KL
Loss 38.5, with variance voting 38.8, with soft-NMS too 39.2. The authors' README has 38.5 and 39.2, Detectron's model
zoo 37.9; 38.8 is quoted second-hand. Ours: not run yet. Hardware of the paper: 8 GPUs of 2 images; the README's
configs for fewer GPUs keep the linear rule, as `learning_rate` does here.

The released result does not start from ImageNet weights: it starts from Detectron's finished 2x model (35857389)
and trains for the 2x schedule once more. `init=detector` is that start, with the .pkl file of that model. Layers that
do not fit keep their fresh values: the log variances, and the box predictor, which the file codes by centres and sizes
(the release loads it as if it coded corners). The RPN keeps its own coding, which the release changes to corners. A
fair baseline is `loss=smooth_l1` with the same start and schedule.

    schedule    1x, 2x (90k and 180k steps of 16 images, Detectron's), or 4x (twice 2x; ours)
    init        imagenet or detector; from imagenet RoIAlign is the aligned one, Detectron's is not
    weights     detectron (R-50.pkl, R-101.pkl of MSRA) or torchvision (its ImageNet .pth); sets pixels and strides
    depth       50 or 101
    legacy      none, or detectron: the habits of the released code, for its weights (docs/legacy.md)
    batch_size  of all devices together; the number of steps and the learning rate follow it

From Detectron: everything but what is marked as ours. Also ours: proposals of each image are ranked alone (2000 in
training; Detectron ranks those of an image pair together), weight decay leaves biases and norms out, 2000 candidates
at most enter NMS, the frozen layers are detectron2's (stem and res2), and the canvases.
"""

import ml_collections

from configs import common

# Images shown by each schedule, in batches of 16.
IMAGES = {"1x": 16 * 90_000, "2x": 16 * 180_000, "4x": 16 * 360_000}
STAGE_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return resnet_fpn(arg, masks=False)


def resnet_fpn(arg: str | None, *, masks: bool) -> ml_collections.ConfigDict:
    """Returns the config of Faster R-CNN, or with `masks` of Mask R-CNN."""
    variant = common.parse_arg(arg, **common.VARIANT, **common.RESNET_VARIANT, depth=50, batch_size=16)
    config = common.base(variant)
    config.data.update(mask_size=112 if masks else 0, skip_empty_boxes=True)
    config.model.backbone.stage_blocks = common.choose(STAGE_BLOCKS, variant, "depth")
    config.model.rpn.anchor_offset = 0.5
    config.model.mask_head.enabled = masks
    common.set_resnet_weights(config, variant)
    common.set_schedule(config, variant, images=common.choose(IMAGES, variant, "schedule"))
    return config
