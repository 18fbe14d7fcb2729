"""Faster R-CNN with ResNet-50-FPN in the setting of the measures: the config, the batch and the steps."""

import functools
from collections.abc import Callable

import ml_collections

from benchmarks.steps import Step, make_batch, make_step
from configs import faster_rcnn_resnet50_fpn
from klbox_jax.structures import Batch

CANVAS = (320, 320)
CLASSES = 80
TRAIN_IMAGES = 2
ROIS_PER_IMAGE = 128
PROPOSALS_BEFORE_NMS = 1000
TRAIN_PROPOSALS, TEST_PROPOSALS = 512, 1000


def make_config(loss: str) -> ml_collections.ConfigDict:
    """Returns the config of the full-scale detector with the proposals and RoIs of the measures."""
    config = faster_rcnn_resnet50_fpn.get_config(f"loss={loss},weights=torchvision")
    config.model.roi_heads.batch_size_per_image = ROIS_PER_IMAGE
    config.model.rpn.pre_nms_topk = (PROPOSALS_BEFORE_NMS, PROPOSALS_BEFORE_NMS)
    config.model.rpn.post_nms_topk = (TRAIN_PROPOSALS, TEST_PROPOSALS)
    return config


def images(count: int) -> Batch:
    """Returns a batch of the measures."""
    return make_batch(count, canvas=CANVAS, classes=CLASSES)


def training(loss: str) -> Step:
    """Returns the training step of a loss."""
    return make_step("train", make_config(loss), images(TRAIN_IMAGES), classes=CLASSES)


@functools.cache
def train_runner(loss: str) -> Callable[[], None]:
    """Returns the training step as a function, which several measures share: it compiles for half a minute."""
    return training(loss).runner()


def eval_runner(loss: str, *, suppression: str, voting: str) -> Callable[[], None]:
    """Returns the eval step on one image, from the batch to the detections, as a function."""
    config = make_config(loss)
    config.postprocess.update(suppression=suppression, voting=voting)
    return make_step("eval", config, images(1), classes=CLASSES).runner()
