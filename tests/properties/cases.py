"""Candidates to permute, pad and move: clusters of boxes in half pixels, with distinct scores."""

import jax.numpy as jnp
import numpy as np

from tests.references.boxes import clustered_boxes

# Half pixels, moved by whole pixels and scaled by powers of two: float32 is exact, and every IoU is equal to the bit.
SHIFT = np.array([64, -32, 64, -32], np.float32)
SCALE = np.float32(4)
COUNT = 48
KEPT = 10


def candidates(seed, *, count=COUNT):
    rng = np.random.default_rng(seed)
    return {
        "boxes": clustered_boxes(rng, count),
        "scores": ((rng.permutation(count) + 1) / (2 * count)).astype(np.float32),
        "ious": ((rng.permutation(count) + 1) / (2 * count)).astype(np.float32),
        "classes": rng.integers(0, 2, count).astype(np.int32),
        "valid": rng.random(count) < 0.9,
        "variances": np.exp(rng.uniform(-3, 2, (count, 4))).astype(np.float32),
        "pixel_variances": rng.uniform(1, 50, (count, 4)).astype(np.float32),
    }


def take(case, rows):
    return {name: values[rows] for name, values in case.items()}


def with_garbage(case, seed, *, extra=16):
    """Returns the same rows in the same order between invalid rows with better scores, and the places of the rows."""
    rng = np.random.default_rng(seed)
    count = len(case["scores"])
    rows = np.sort(rng.permutation(count + extra)[:count])
    # Copies of valid rows with better scores, and numbers that no box has.
    garbage = take(case, rng.integers(0, count, extra))
    garbage["boxes"][::4] = 3e6 * rng.normal(size=(len(garbage["boxes"][::4]), 4))
    garbage["scores"], garbage["ious"] = garbage["scores"] + 2, garbage["ious"] + 3
    garbage["variances"][::3] = -1e6
    garbage["pixel_variances"][::3] = 0
    garbage["valid"][:] = False
    is_row = np.isin(np.arange(count + extra), rows)
    padded = {}
    for name, values in case.items():
        padded[name] = np.empty((count + extra, *values.shape[1:]), values.dtype)
        padded[name][is_row], padded[name][~is_row] = values, garbage[name]
    return padded, rows


def on_device(case):
    return {name: jnp.asarray(values) for name, values in case.items()}
