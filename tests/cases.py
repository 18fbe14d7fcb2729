"""Random inputs of the op tests, and ground truth from few arguments."""

import numpy as np

from klbox_jax.structures import GroundTruth


def ground_truth(boxes, classes=None, *, is_crowd=None, valid=None, box_stds=None):
    """Objects of an image, or of a batch where `boxes` is [b, g, 4]: unless given, valid ones of class 0."""
    boxes = np.asarray(boxes, np.float32)
    shape = boxes.shape[:-1]
    return GroundTruth(
        boxes=boxes,
        classes=np.zeros(shape, np.int32) if classes is None else np.asarray(classes, np.int32),
        is_crowd=np.zeros(shape, bool) if is_crowd is None else np.asarray(is_crowd),
        valid=np.ones(shape, bool) if valid is None else np.asarray(valid),
        box_stds=box_stds,
    )


def random_features(*shape, seed=0):
    """Normal noise, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_boxes(count, *, seed=0, canvas=100.0, smallest=0.5):
    """Boxes around a canvas, some of them partly or completely outside it."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-0.4 * canvas, 1.1 * canvas, (count, 2))
    sides = rng.uniform(smallest, canvas, (count, 2))
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
