"""Where a foreign tensor goes: the path of our parameter, and how its axes are turned.

Torch and Caffe2 share their layouts: convolutions are [out, in, height, width], linear layers [out, in]. A
tensor whose axes do not fit is returned as it is: its shape is compared with the parameter's in any case.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


class Target(NamedTuple):
    """What becomes of a tensor of the file.

    Attributes:
        path: of our parameter; empty for a tensor that no detector needs, such as a classifier's last layer.
        transform: turns the tensor into ours.
    """

    path: tuple[str, ...]
    transform: Transform


def same(value: np.ndarray) -> np.ndarray:
    """The tensor itself."""
    return value


def conv(value: np.ndarray) -> np.ndarray:
    """OIHW to HWIO."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def deconv(value: np.ndarray) -> np.ndarray:
    """IOHW, the layout of transposed convolutions, to HWIO."""
    return value.transpose(2, 3, 0, 1) if value.ndim == 4 else value


def linear(value: np.ndarray) -> np.ndarray:
    """[out, in] to [in, out]."""
    return value.T


def linear_after_pooling(side: int) -> Transform:
    """Of a linear layer over `side` x `side` bins, which the others flatten by C, H, W and we by H, W, C."""

    def turn(value: np.ndarray) -> np.ndarray:
        if value.ndim != 2 or value.shape[1] % side**2:
            return value
        maps = value.reshape(value.shape[0], -1, side, side)
        return maps.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])

    return turn


def background_last(value: np.ndarray) -> np.ndarray:
    """Rows of class scores with the background, which comes first, moved to the end."""
    return np.roll(value, -1, axis=0)


def without_background(rows: int) -> Transform:
    """Leaves out the first `rows` rows, which are the background's, where there are others."""

    def cut(value: np.ndarray) -> np.ndarray:
        return value[rows:] if value.ndim and value.shape[0] > rows else value

    return cut


def layer(*path: str, leaf: str, weight: Transform = same, rows: Transform = same) -> Target:
    """The target of a layer's 'weight' or 'bias': `rows` reorders the outputs of both, `weight` turns the first."""
    if leaf == "weight":
        return Target((*path, "kernel"), lambda value: weight(rows(value)))
    return Target((*path, "bias"), rows)


NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def norm(*path: str, leaf: str) -> Target:
    """The target of a frozen batch norm's 'weight', 'bias', 'running_mean' or 'running_var'."""
    return Target((*path, NORM_LEAVES[leaf]), same)


IGNORED = Target((), same)
