"""Inputs of RoIAlign, equal for both sides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class PoolingInputs:
    """Feature maps and RoIs of a batch.

    Attributes:
        pyramid: maps `p2`, `p3`, ..., each `[batch, height, width, channels]`, float32.
        boxes: RoIs in pixels of the canvas, `[batch, rois, 4]`.
        cotangent: gradient of the pooled features, `[batch, rois, bins, bins, channels]`.
    """

    pyramid: dict[str, np.ndarray]
    boxes: np.ndarray
    cotangent: np.ndarray


def make_pooling_inputs(batch: int, canvas: tuple[int, int], model: Mapping[str, Any]) -> PoolingInputs:
    """Returns random maps of a network's pyramid, and as many RoIs of many sizes as it trains on.

    Args:
        batch: images.
        canvas: height and width in pixels.
        model: of a `Network`.
    """
    rng = np.random.default_rng(0)
    height, width = canvas
    channels, bins = model["fpn"]["features"], model["box_pooler"]["resolution"]
    rois = model["roi_heads"]["batch_size_per_image"]
    pyramid = {
        f"p{level}": rng.standard_normal(
            (batch, -(-height // 2**level), -(-width // 2**level), channels), np.float32
        )
        for level in model["box_pooler"]["levels"]
    }
    sides = np.exp(rng.uniform(np.log(min(canvas) / 40), np.log(0.8 * min(canvas)), (batch, rois, 2)))
    corners = rng.uniform(size=sides.shape) * (np.array([width, height]) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=-1).astype(np.float32)
    cotangent = rng.standard_normal((batch, rois, bins, bins, channels), np.float32)
    return PoolingInputs(pyramid, boxes, cotangent)
