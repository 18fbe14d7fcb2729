"""Sizes of a small detector with which the cost of a step may grow, one axis at a time."""

import dataclasses
import math
from typing import Any

import ml_collections

from configs import scenes


@dataclasses.dataclass(frozen=True)
class Setting:
    """The detector of configs/scenes.py under the sizes of a run; its box head has a box for each class."""

    batch: int = 4  # images of a step, on all devices
    canvas: tuple[int, int] = (256, 256)  # height and width; multiples of 32
    rois: int = 64  # RoIs sampled from each image in training
    gt_slots: int = 8  # ground-truth slots of an image
    classes: int = 80  # K
    detections: int = 50  # detections of an image
    candidates: int = 400  # (proposal, class) pairs that enter suppression and voting
    proposals: int = 200  # boxes of each pyramid level that enter the NMS of the RPN; all, if there are fewer


@dataclasses.dataclass(frozen=True)
class Axis:
    """One field of a `Setting`, and the values it takes; each has twice the size of the one before."""

    field: str  # of `Setting`; the others keep their defaults
    values: tuple[Any, ...]  # ascending
    label: str  # the size, in words

    @property
    def sizes(self) -> tuple[int, ...]:
        """The values as numbers: of a canvas, its area in pixels."""
        return tuple(math.prod(value) if isinstance(value, tuple) else value for value in self.values)

    def settings(self) -> tuple[Setting, ...]:
        """Returns the setting of each value."""
        return tuple(Setting(**{self.field: value}) for value in self.values)


AXES = (
    Axis("batch", (1, 2, 4, 8, 16), "batch, images"),
    Axis("canvas", ((128, 128), (128, 256), (256, 256), (256, 512), (512, 512)), "image area, pixels"),
    Axis("rois", (32, 64, 128, 256, 512), "RoIs of an image"),
    Axis("gt_slots", (8, 16, 32, 64, 128), "ground-truth slots"),
    Axis("classes", (40, 80, 160, 320, 640), "classes"),
    Axis("detections", (25, 50, 100, 200, 400), "detections of an image"),
    Axis("candidates", (200, 400, 800, 1600, 3200), "candidates of an image"),
    Axis("proposals", (200, 400, 800, 1600, 3200), "proposals of a level before NMS"),
)


def make_config(setting: Setting) -> ml_collections.ConfigDict:
    """Returns the config of a setting."""
    config = scenes.get_config()
    config.data.canvases = (setting.canvas,)
    config.data.max_gt = setting.gt_slots
    config.model.roi_heads.batch_size_per_image = setting.rois
    config.model.roi_heads.class_agnostic = False
    config.model.rpn.pre_nms_topk = (setting.proposals, setting.proposals)
    # In training as many as the largest number of RoIs of an axis.
    config.model.rpn.post_nms_topk = (512, 300)
    config.postprocess.pre_nms_topk = setting.candidates
    config.postprocess.detections_per_image = setting.detections
    config.train.batch_size = setting.batch
    return config
