"""Synthetic images with boxes, equal for our detector and torchvision's."""

import jax
import numpy as np

from benchmarks.steps import make_batch
from klbox_jax.structures import Batch

# Different images of a batch; larger batches repeat them.
DIFFERENT = 4


def make_images(num_images: int, canvas: tuple[int, int], *, num_classes: int) -> Batch:
    """Returns a batch of smooth noise with objects of many sizes, on the host.

    Args:
        num_images: batch size.
        canvas: height and width in pixels.
        num_classes: without the background.
    """
    batch = make_batch(min(num_images, DIFFERENT), canvas=canvas, classes=num_classes)
    rows = np.arange(num_images) % DIFFERENT
    return jax.tree.map(lambda values: values[rows], batch)
