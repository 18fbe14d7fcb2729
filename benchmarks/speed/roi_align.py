"""RoIAlign of 512 RoIs into 7 x 7 bins on one map, against torchvision's operator."""

import functools

import jax
import numpy as np

from benchmarks.speed.measure import Sides, timed
from klbox_jax.ops.roi_pooling import roi_align

HEIGHT, WIDTH, CHANNELS, ROIS, BINS = 80, 80, 256, 512, 7
# Of the largest value, by which the two may differ.
TOLERANCE = 1e-4


def make_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a map, RoIs of many sizes in its cells, and a gradient of the pooled features."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
    sides = np.exp(rng.uniform(np.log(4), np.log(40), (ROIS, 2)))
    corners = rng.uniform(size=sides.shape) * (np.array([WIDTH, HEIGHT]) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    return features, boxes, rng.normal(size=(ROIS, BINS, BINS, CHANNELS)).astype(np.float32)


def sides(*, with_gradient: bool) -> Sides:
    """Returns RoIAlign of both; with the gradient of the map, or the pooled features alone."""
    from benchmarks import torchvision_peer as peer

    features, boxes, cotangent = make_inputs()
    pool = functools.partial(roi_align, output_size=BINS, sampling_ratio=2, spatial_scale=1.0)

    @jax.jit
    def run(features, boxes, cotangent):
        if not with_gradient:
            return (pool(features, boxes),)
        pooled, backward = jax.vjp(lambda features: pool(features, boxes), features)
        return pooled, *backward(cotangent)

    arguments = jax.device_put((features, boxes, cotangent))
    theirs = peer.make_roi_align(features, boxes, cotangent if with_gradient else None)
    for mine, other in zip(run(*arguments), theirs(), strict=True):
        # Theirs are [1 or R, C, h, w]; ours are [h, w, C] or [R, h, w, C].
        other = np.moveaxis(other.detach().numpy(), 1, -1).reshape(mine.shape)
        if np.abs(mine - other).max() > TOLERANCE * np.abs(other).max():
            raise ValueError("RoIAlign differs from torchvision's, so that its time means nothing")
    return Sides(ours=timed(lambda: jax.block_until_ready(run(*arguments))), peer=timed(theirs))
