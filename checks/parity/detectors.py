"""Compares whole networks of torchvision's with ours, which are loaded from their state dicts."""

import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import torchvision_peer
from checks.parity import peer
from checks.parity.comparison import Comparison, largest
from checks.parity.inputs import load, make_batch
from checks.parity.stages import compare_backbone, compare_end_to_end, compare_heads, compare_rpn
from checks.parity.training import compare_training
from configs import torchvision as preset
from klbox_jax.models.vgg import VGG16
from klbox_jax.weights.convert import load_weights

# RoIs sampled in an image, fewer than the preset's 512 to save time.
ROIS_PER_IMAGE = 32
# Parameters of torchvision's last layers for the background's box and mask, which ours do not have.
BACKGROUND_BOX, BACKGROUND_MASK = 4 * (1024 + 1), 256 + 1


def compare_detector(name: str, *, seed: int, folder: pathlib.Path) -> Iterator[Comparison]:
    """Compares one of torchvision's detectors with ours, loaded from its state dict."""
    theirs = peer.build(name, seed=seed, rois_per_image=ROIS_PER_IMAGE)
    config = preset.get_config(f"model={name}")
    config.model.roi_heads.batch_size_per_image = ROIS_PER_IMAGE
    fields = config.model.to_dict() | {part: config[part].to_dict() for part in ("postprocess", "data")}
    for field, value in peer.hyper_parameters(theirs).items():
        ours = functools.reduce(lambda record, part: record[part], field.split("."), fields)
        yield largest("settings", field, ours, value)

    batch = make_batch(seed)
    images = peer.image_list(theirs, batch.images, batch.image_size)
    torchvision_peer.scale_outputs(theirs, images)
    peer.save(theirs, folder / "weights.pth")
    ours = load(config, folder / "weights.pth", seed=seed)
    leaves = flatten_dict(ours.params)
    yield largest("parameters", "tensors filled", ours.num_loaded, len(leaves))
    trained = sum(leaf.size for path, leaf in leaves.items() if "norm" not in path[-2])
    background = BACKGROUND_BOX + (BACKGROUND_MASK if ours.model.roi_heads.mask_head else 0)
    yield largest("parameters", "count", trained + background, peer.num_parameters(theirs))

    features, activations = peer.activations(theirs, images)
    pyramid = {
        f"p{level}": jnp.asarray(peer.channels_last(x)) for level, x in enumerate(features.values(), start=2)
    }
    found = peer.evaluate(theirs, images, features)
    yield from compare_backbone(ours, pyramid, activations)
    yield from compare_rpn(ours, pyramid, found)
    yield from compare_heads(ours, pyramid, found)
    yield from compare_end_to_end(ours, found)
    yield from compare_training(ours, theirs, images, folder)


def compare_vgg16(*, seed: int, folder: pathlib.Path) -> Iterator[Comparison]:
    """Compares the last map of VGG-16, for an image whose sides 16 divides."""
    images = np.random.default_rng(seed).normal(size=(1, 96, 128, 3)).astype(np.float32)
    theirs = peer.vgg16_features(images, folder / "vgg16.pth", seed=seed)
    net = VGG16()
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.asarray(images)))["params"]
    fresh = {"backbone": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)}
    params, report = load_weights(fresh, folder / "vgg16.pth")
    yield largest("parameters", "tensors filled", len(report.loaded), 26)
    ours = jax.jit(net.apply)({"params": params["backbone"]}, jnp.asarray(images))["res4"]
    yield largest("layers", "features.29", ours, theirs)
