"""Places of foreign tensors in our parameters, and the transposition of their axes.

Torch and Caffe2 have the same layouts: convolutions are [out, in, height, width], linear layers [out, in]. A
tensor whose number of axes does not fit is returned unchanged; the comparison of shapes then reports it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


class Target(NamedTuple):
    """The place of a tensor of a file.

    Attributes:
        path: path of our parameter; empty for a tensor that no detector needs, such as a classifier's last layer.
        transform: converts the tensor to our layout.
    """

    path: tuple[str, ...]
    transform: Transform


def same(value: np.ndarray) -> np.ndarray:
    """Returns the tensor itself."""
    return value


def conv(value: np.ndarray) -> np.ndarray:
    """Transposes OIHW to HWIO."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def deconv(value: np.ndarray) -> np.ndarray:
    """Transposes IOHW, the layout of transposed convolutions, to HWIO."""
    return value.transpose(2, 3, 0, 1) if value.ndim == 4 else value


def linear(value: np.ndarray) -> np.ndarray:
    """Transposes [out, in] to [in, out]."""
    return value.T


def linear_after_pooling(side: int) -> Transform:
    """Returns the transform of a linear layer over `side` x `side` bins, from C, H, W to our order H, W, C."""

    def turn(value: np.ndarray) -> np.ndarray:
        if value.ndim != 2 or value.shape[1] % side**2:
            return value
        maps = value.reshape(value.shape[0], -1, side, side)
        return maps.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])

    return turn


def background_last(value: np.ndarray) -> np.ndarray:
    """Moves the row of the background from the first to the last place."""
    return np.roll(value, -1, axis=0)


def without_background(rows: int) -> Transform:
    """Returns the transform that removes the first `rows` rows, those of the background, if there are others."""

    def cut(value: np.ndarray) -> np.ndarray:
        return value[rows:] if value.ndim and value.shape[0] > rows else value

    return cut


def layer(*path: str, leaf: str, weight: Transform = same, rows: Transform = same) -> Target:
    """Returns the target of a layer's 'weight' or 'bias': `rows` reorders outputs, `weight` transposes the first."""
    if leaf == "weight":
        return Target((*path, "kernel"), lambda value: weight(rows(value)))
    return Target((*path, "bias"), rows)


NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def norm(*path: str, leaf: str) -> Target:
    """Returns the target of a frozen batch norm's 'weight', 'bias', 'running_mean' or 'running_var'."""
    return Target((*path, NORM_LEAVES[leaf]), same)


IGNORED = Target((), same)
