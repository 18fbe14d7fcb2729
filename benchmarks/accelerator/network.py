"""Numbers of the networks that are measured, without ml_collections, which the image of a GPU need not have.

`RESNET50_FPN` is `configs/faster_rcnn_resnet50_fpn.py:loss=kl,weights=torchvision`, and `SMALL` is
`configs/scenes.py:loss=kl,size=tiny`; a test compares all numbers. torchvision's default detector has the same numbers
of proposals and RoIs as the first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

BOX_LOSS_SETTINGS = {
    "log_var_clamp": (-7.0, 7.0),
    "smooth_l1_beta": 1.0,
    "beta_nll_beta": 0.5,
    "num_samples": 100,
    "label_noise": "data",
    "label_noise_value": 1.0,
    "ramp_steps": 0,
}
POSTPROCESS = {
    "suppression": "soft_gaussian",
    "voting": "variance",
    "sigma_t": 0.02,
    "nms_threshold": 0.5,
    "soft_nms_sigma": 0.5,
    "soft_nms_min_score": 0.001,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A detector in numbers.

    Attributes:
        num_classes: without the background.
        model: a `config.model`.
        optimizer: arguments of `make_optimizer`, without its schedule.
        postprocess: a `config.postprocess`; fields that are left out have their defaults.
        param_factors: of `benchmarks.steps.random_params`; all activations have a size of about 1.
        learning_rate: constant rate of the steps that must lower the loss.
        lowest_trained: paths of the layers right above the frozen ones; their inputs need no gradient.
    """

    num_classes: int
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    postprocess: Mapping[str, Any]
    param_factors: Mapping[str, float]
    learning_rate: float
    lowest_trained: tuple[str, ...]


RESNET50_FPN = Network(
    num_classes=80,
    model={
        "box_loss": "kl",
        "box_loss_settings": BOX_LOSS_SETTINGS,
        "backbone": {"name": "bottleneck_resnet", "stage_blocks": (3, 4, 6, 3), "stride_in_1x1": False},
        "fpn": {"features": 256, "levels": (2, 3, 4, 5), "extra_levels": 1},
        "rpn": {
            "features": 256,
            "levels": (2, 3, 4, 5, 6),
            "anchor_sizes": ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
            "aspect_ratios": (0.5, 1.0, 2.0),
            "anchor_offset": 0.5,
            "pre_nms_topk": (2000, 1000),
            "post_nms_topk": (2000, 1000),
            "nms_threshold": 0.7,
            "iou_thresholds": (0.3, 0.7),
            "batch_size_per_image": 256,
            "positive_fraction": 0.5,
            "box_coder": "center",
            "plus_one_widths": False,
        },
        "roi_heads": {
            "box_coder": "corner",
            "box_coder_weights": (10.0, 10.0, 10.0, 10.0),
            "class_agnostic": False,
            "batch_size_per_image": 512,
            "positive_fraction": 0.25,
            "box_loss_weight": 1.0,
        },
        "box_pooler": {
            "method": "align",
            "levels": (2, 3, 4, 5),
            "resolution": 7,
            "sampling_ratio": 2,
            "canonical_box_size": 224.0,
            "canonical_level": 4,
            "aligned": True,
            "plus_one_widths": False,
        },
        "box_head": {"name": "two_mlp", "features": 1024},
        "mask_head": {"enabled": False},
        "iou_head": {"enabled": False},
        "pixel_mean": (123.675, 116.28, 103.53),
        "pixel_std": (58.395, 57.12, 57.375),
    },
    optimizer={
        "name": "sgd",
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "clip_norm": 0.0,
        "frozen": (
            "backbone/stem",
            "backbone/stem_norm",
            "backbone/res2_0",
            "backbone/res2_1",
            "backbone/res2_2",
        ),
    },
    postprocess=POSTPROCESS | {"score_threshold": 0.05, "pre_nms_topk": 2000, "detections_per_image": 100},
    param_factors={
        # Else every sum of a residual block with its shortcut would double the variance.
        "norm3/scale": 0.3,
        **{f"fpn_lateral{level}/kernel": 0.1 for level in (2, 3, 4, 5)},
        "anchor_deltas/kernel": 0.1,
        "bbox_pred/kernel": 0.3,
        "bbox_log_var/kernel": 0.3,
    },
    # Without normalization layers that train, the gradient is large.
    learning_rate=5e-6,
    lowest_trained=("backbone/res3_0/conv1", "backbone/res3_0/shortcut", "fpn/fpn_lateral2"),
)
SMALL = Network(
    num_classes=3,
    model={
        "box_loss": "kl",
        "box_loss_settings": BOX_LOSS_SETTINGS,
        "backbone": {
            "name": "resnet",
            "stem_features": 8,
            "stage_features": (8, 8, 16),
            "stage_blocks": (1, 1, 1),
            "group_size": 4,
        },
        "fpn": {"features": 16, "levels": (3, 4), "extra_levels": 0},
        "rpn": {
            "features": 16,
            "levels": (3, 4),
            "anchor_sizes": ((16.0, 26.0), (40.0, 60.0)),
            "aspect_ratios": (0.5, 1.0, 2.0),
            "pre_nms_topk": (64, 32),
            "post_nms_topk": (48, 32),
            "nms_threshold": 0.85,
            "iou_thresholds": (0.3, 0.6),
            "batch_size_per_image": 32,
            "positive_fraction": 0.5,
        },
        "roi_heads": {
            "box_coder": "corner",
            "box_coder_weights": (10.0, 10.0, 10.0, 10.0),
            "class_agnostic": True,
            "batch_size_per_image": 16,
            "positive_fraction": 0.5,
            "box_loss_weight": 1.0,
        },
        "box_pooler": {
            "method": "align",
            "levels": (3,),
            "resolution": 4,
            "sampling_ratio": 2,
            "canonical_box_size": 96.0,
            "canonical_level": 4,
        },
        "box_head": {"name": "two_mlp", "features": 32},
        "mask_head": {"enabled": False},
        "iou_head": {"enabled": False},
        "pixel_mean": (127.5, 127.5, 127.5),
        "pixel_std": (64.0, 64.0, 64.0),
    },
    optimizer={
        "name": "adamw",
        "weight_decay": 0.01,
        "momentum": 0.9,
        "clip_norm": 10.0,
        "frozen": (),
    },
    postprocess=POSTPROCESS | {"score_threshold": 0.0, "pre_nms_topk": 64, "detections_per_image": 20},
    param_factors={"anchor_deltas/kernel": 0.1, "bbox_pred/kernel": 0.3, "bbox_log_var/kernel": 0.3},
    learning_rate=1e-3,
    lowest_trained=("backbone/stem",),
)
NETWORKS = {"resnet50_fpn": RESNET50_FPN, "small": SMALL}
