"""Inputs of both detectors: our network, a batch, and boxes in a fixed number of slots."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch, GroundTruth, Proposals
from klbox_jax.weights.convert import load_weights


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our detector, its parameters, and the batch that both detectors see."""

    config: ml_collections.ConfigDict
    model: GeneralizedRCNN
    params: Any
    batch: Batch
    num_loaded: int  # parameters that were read from the file

    @property
    def settings(self) -> PostprocessSettings:
        """The post-processing of the config."""
        return PostprocessSettings(**self.config.postprocess)

    def apply(self, *arguments: Any, **options: Any) -> Any:
        """Runs a method of the model, jitted in the parameters and the arguments."""
        run = jax.jit(lambda params, *arguments: self.model.apply({"params": params}, *arguments, **options))
        return run(self.params, *arguments)


def load(config: ml_collections.ConfigDict, path: pathlib.Path, *, seed: int) -> Ours:
    """Returns our detector of a config, with the parameters of a state dict of torchvision."""
    model = build_model(config.model, num_classes=90)
    batch = make_batch(seed)
    if model.roi_heads.mask_head is None:
        batch = batch.replace(gt=batch.gt.replace(masks=None))
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: model.init(key, batch, key, method="train_forward"))["params"]
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params, num_loaded = read(fresh, path, model)
    return Ours(config, model, params, batch, num_loaded)


def make_batch(seed: int) -> Batch:
    """Returns two images, one of them padded, with three and two objects and masks of one shape."""
    rng = np.random.default_rng(seed)
    sizes = np.array([[128, 128], [112, 100]], np.int32)
    # Smooth colours with noise on them, which a backbone of random weights can tell apart.
    coarse = np.kron(rng.uniform(0, 255, (2, 8, 8, 3)), np.ones((1, 16, 16, 1)))
    images = np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[h:], image[:, w:] = 0, 0
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (2, 4, 1))
    boxes[0, :3] = [[10.3, 12.1, 50.7, 61.9], [60.2, 30.4, 117.8, 75.3], [33.1, 70.6, 57.2, 99.5]]
    boxes[1, :2] = [[5.6, 40.3, 48.4, 104.7], [52.9, 7.7, 91.3, 44.1]]
    rows, columns = np.mgrid[:28, :28]
    disk = ((rows - 13.2) ** 2 + (columns - 13.9) ** 2 < 150).astype(np.uint8)
    valid = np.array([[True] * 3 + [False], [True] * 2 + [False] * 2])
    gt = GroundTruth(
        boxes=boxes,
        classes=np.where(valid, rng.integers(0, 90, (2, 4)), 0).astype(np.int32),
        is_crowd=np.zeros((2, 4), bool),
        valid=valid,
        masks=np.broadcast_to(disk, (2, 4, 28, 28)).copy(),
    )
    return Batch(
        images=images,
        image_size=sizes,
        scale=np.ones((2, 2), np.float32),
        image_id=np.arange(2, dtype=np.int32),
        valid=np.ones(2, bool),
        gt=gt,
    )


def padded(boxes: list[np.ndarray], slots: int) -> Proposals:
    """Returns lists of boxes as proposals of a fixed number of slots."""
    return Proposals(
        boxes=jnp.asarray(np.stack([np.pad(each, ((0, slots - len(each)), (0, 0))) for each in boxes])),
        objectness_logits=jnp.zeros((len(boxes), slots)),
        valid=jnp.asarray(np.stack([np.arange(slots) < len(each) for each in boxes])),
    )


def used(values: Any, valid: Any) -> np.ndarray:
    """Returns the rows of all images that are not padding, one after the other."""
    return np.asarray(values)[np.asarray(valid)]


def read(params: Any, path: pathlib.Path, model: GeneralizedRCNN) -> tuple[Any, int]:
    """Returns the parameters of a state dict, and the number of filled ones."""
    coders = {"box_coder": model.roi_heads.box_coder, "rpn_box_coder": model.rpn.box_coder}
    filled, report = load_weights(params, path, **coders)
    return filled, len(report.loaded)
