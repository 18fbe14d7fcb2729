"""Fitted numbers that each class has for itself, with a default for the others."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int
from numpy import ndarray


def rows_of_classes(
    default: ndarray, by_class: Mapping[int, ndarray], classes: Int[ndarray, " n"]
) -> ndarray:
    """Returns for each row the array of its class, or `default` where the class has none; [n, *shape of default]."""
    names = np.array(sorted(by_class), np.int64)
    if not len(names):
        return np.broadcast_to(default, (len(classes), *default.shape))
    table = np.stack([*(by_class[name] for name in names.tolist()), default])
    places = np.minimum(np.searchsorted(names, classes), len(names) - 1)
    return table[np.where(names[places] == classes, places, len(names))]
