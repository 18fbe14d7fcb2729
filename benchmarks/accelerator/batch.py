"""Synthetic images with boxes, equal for our detector and torchvision's."""

import numpy as np

from klbox_jax.structures import Batch, GroundTruth

OBJECTS = 8
# Pixels of a cell of one colour.
CELL = 16


def make_batch(num_images: int, canvas: tuple[int, int], *, num_classes: int, seed: int = 0) -> Batch:
    """Returns images of coloured cells with noise, which fill the canvas, and random boxes of many sizes.

    Args:
        num_images: batch size.
        canvas: height and width in pixels, multiples of `CELL`.
        num_classes: without the background.
        seed: of all random numbers.
    """
    rng = np.random.default_rng(seed)
    height, width = canvas
    cells = rng.uniform(0, 255, (num_images, height // CELL, width // CELL, 3)).astype(np.float32)
    images = cells.repeat(CELL, axis=1).repeat(CELL, axis=2)
    images += 20 * rng.standard_normal(images.shape, np.float32)
    shorter = min(canvas)
    sides = np.exp(rng.uniform(np.log(shorter / 16), np.log(0.7 * shorter), (num_images, OBJECTS, 2)))
    corners = rng.uniform(size=sides.shape) * (np.array([width, height]) - sides)
    return Batch(
        images=np.clip(images, 0, 255).astype(np.uint8),
        image_size=np.tile(np.array(canvas, np.int32), (num_images, 1)),
        scale=np.ones((num_images, 2), np.float32),
        image_id=np.arange(num_images, dtype=np.int32),
        valid=np.ones(num_images, bool),
        gt=GroundTruth(
            boxes=np.concatenate([corners, corners + sides], axis=-1).astype(np.float32),
            classes=rng.integers(0, num_classes, (num_images, OBJECTS)).astype(np.int32),
            is_crowd=np.zeros((num_images, OBJECTS), bool),
            valid=np.ones((num_images, OBJECTS), bool),
        ),
    )
