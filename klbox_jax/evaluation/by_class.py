"""Fitted numbers that each class has for itself, with a default for the others; a class is a whole number or a text."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray


def rows_of_classes(
    default: ndarray, by_class: Mapping[int | str, ndarray], classes: Shaped[ndarray, " n"]
) -> ndarray:
    """Returns for each row the array of its class, or `default` where the class has none; [n, *shape of default]."""
    names = np.array(sorted(by_class))
    if not len(names) or (names.dtype.kind == "U") != (classes.dtype.kind == "U"):
        return np.broadcast_to(default, (len(classes), *default.shape))
    table = np.stack([*(by_class[name] for name in names.tolist()), default])
    places = np.minimum(np.searchsorted(names, classes), len(names) - 1)
    return table[np.where(names[places] == classes, places, len(names))]


def to_pairs(by_class: Mapping[int | str, ndarray]) -> list[list]:
    """Returns `[class, numbers]` of each class for JSON, whose keys would turn numbers into texts."""
    return [[name, to_lists(by_class[name])] for name in sorted(by_class)]


def from_pairs(pairs: Sequence[Sequence]) -> dict[int | str, ndarray]:
    """Returns the mapping that `to_pairs` wrote."""
    return {name: from_lists(values) for name, values in pairs}


def to_lists(values: ndarray) -> list:
    """Returns nested lists for JSON; infinity is None."""
    return [
        to_lists(value) if isinstance(value, ndarray) else None if math.isinf(value) else float(value)
        for value in values
    ]


def from_lists(values: Sequence) -> ndarray:
    """Returns the array that `to_lists` wrote."""
    array = np.array(values, np.float64)  # None becomes NaN
    return np.where(np.isnan(array), np.inf, array)
