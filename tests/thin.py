"""The shipped configs made thin, and small batches: what tests of whole networks compile in seconds."""

import jax
import numpy as np

from configs import faster_rcnn_mobilenet_v2_fpn, scenes
from klbox_jax.models.build import build_model
from klbox_jax.structures import Batch, GroundTruth

# The network of `size=tiny`, for configs of other families.
TINY_NETWORK = {
    name: value for name, value in scenes.TINY.items() if name.startswith(("model.", "postprocess."))
}
TINY_COCO = TINY_NETWORK | {
    "model.rpn.anchor_sizes": ((16.0, 23.0), (32.0, 45.0)),
    "model.box_pooler.levels": (3, 4),
    "model.box_pooler.canonical_level": 4,
    "model.box_pooler.canonical_box_size": 48.0,
    "data.short_side": 80,
    "data.long_side": 96,
    "data.canvases": ((64, 96), (96, 64), (80, 80)),
    "data.max_gt": 4,
    "train.batch_size": 4,
    "train.save_every": 100,
    "optimizer.frozen": (),
    "evaluation.batch_size": 4,
}


def _override(config, fields):
    config.update_from_flattened_dict(fields)
    return config.lock()


def scenes_config(arg=None, **fields):
    """The tiny variant of configs/scenes.py; fields are dotted names with values: `{"train.num_steps": 3}`."""
    return _override(scenes.get_config(f"size=tiny,{arg or ''}"), fields)


def coco_config(root, arg=None, **fields):
    """configs/faster_rcnn_mobilenet_v2_fpn.py over a tiny ResNet and small canvases."""
    config = faster_rcnn_mobilenet_v2_fpn.get_config(arg)
    return _override(config, TINY_COCO | {"data.root": str(root)} | fields)


def thin_model(arg=None, *, num_classes=3, **fields):
    return build_model(scenes_config(arg, **fields).model, num_classes=num_classes)


def random_batch(*, size=2, canvas=(64, 96), slots=8, num_classes=3, seed=0):
    """Noise with boxes; image i has i + 1 objects and fills the canvas but for a margin of its own."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, *canvas, 3), np.uint8)
    image_size = np.array([[canvas[0] - 6 * i, canvas[1] - 11 * i] for i in range(size)], np.int32)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (size, slots, 1))
    valid = np.zeros((size, slots), bool)
    for i, (height, width) in enumerate(image_size):
        images[i, height:], images[i, :, width:] = 0, 0
        for slot in range(i + 1):
            corner = rng.uniform(0, 0.5, 2) * (width, height)
            side = rng.uniform(0.3, 0.5, 2) * (width, height)
            boxes[i, slot] = np.concatenate([corner, corner + side])
            valid[i, slot] = True
    return Batch(
        images=images,
        image_size=image_size,
        scale=np.ones((size, 2), np.float32),
        image_id=np.arange(size, dtype=np.int32),
        valid=np.ones(size, bool),
        gt=GroundTruth(
            boxes=boxes,
            classes=np.where(valid, rng.integers(0, num_classes, (size, slots)), 0).astype(np.int32),
            is_crowd=np.zeros((size, slots), bool),
            valid=valid,
            box_stds=np.where(valid[:, :, None], rng.uniform(0.5, 3, (size, slots, 4)), 1.0).astype(
                np.float32
            ),
        ),
    )


def num_params(params):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
