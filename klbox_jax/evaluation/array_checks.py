"""Checks of arrays that users hand to a fit: one ValueError line that names the array, the fault and the remedy."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike


def edge_rows(name: str, values: ArrayLike, count: int | None = None) -> Float[ndarray, "n 4"]:
    """Returns numbers of four edges as float64.

    Raises:
        ValueError: the shape is not [n, 4], n is not `count`, or a number is not finite.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        values = values.reshape(0, 4)
    if values.ndim != 2 or values.shape[1] != 4:
        raise ValueError(
            f"{name} has shape {values.shape}; give [n, 4], one column for each of x1, y1, x2, y2"
        )
    if count is not None and len(values) != count:
        raise ValueError(f"{name} has {len(values)} rows, not {count}; give one row for each detection")
    _check_finite(name, values)
    return values


def positive_edge_rows(name: str, values: ArrayLike, count: int | None = None) -> Float[ndarray, "n 4"]:
    """Returns positive numbers of four edges; raises ValueError as `edge_rows`, and for one of 0 or less."""
    values = edge_rows(name, values, count)
    if not (values > 0).all():
        row = int(np.flatnonzero((values <= 0).any(axis=1))[0])
        raise ValueError(
            f"{name}[{row}] = {values[row].tolist()} must be positive; raise stds of 0 to a floor, such as 0.1 pixels"
        )
    return values


def numbers(name: str, values: ArrayLike, count: int | None = None) -> Float[ndarray, " n"]:
    """Returns one finite number for each detection as float64; raises ValueError otherwise."""
    values = np.asarray(values, np.float64)
    _check_one_each(name, values, count)
    _check_finite(name, values)
    return values


def shares(name: str, values: ArrayLike, count: int | None = None) -> Float[ndarray, " n"]:
    """Returns numbers from 0 to 1 such as scores or IoUs; raises ValueError as `numbers`, and for one outside."""
    values = numbers(name, values, count)
    if ((values < 0) | (values > 1)).any():
        row = int(np.flatnonzero((values < 0) | (values > 1))[0])
        raise ValueError(
            f"{name}[{row}] = {values[row]} must be from 0 to 1; give probabilities, not logits or per cent"
        )
    return values


def identities(name: str, values: ArrayLike, count: int) -> ndarray:
    """Returns the id of each row, numbers or texts; raises ValueError for another count."""
    values = np.asarray(values)
    _check_one_each(name, values, count)
    return values


def class_ids(name: str, values: ArrayLike | None, count: int) -> ndarray:
    """Returns the class of each row, all int64 or all texts; raises ValueError for anything else, or None."""
    if values is None:
        raise ValueError(f"{name} is missing; give the class of each row, or choose a level without classes")
    values = identities(name, values, count)
    if not values.size or values.dtype.kind in "iu":
        return values.astype(np.int64)
    if all(isinstance(value, str) for value in values.tolist()):
        return values.astype(str)
    raise ValueError(
        f"{name} must be whole numbers, or texts, such as COCO's category ids, not {values.dtype}"
    )


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is unknown; choose {', '.join(choices[:-1])} or {choices[-1]}")


def _check_one_each(name: str, values: ndarray, count: int | None) -> None:
    if values.ndim != 1 or (count is not None and len(values) != count):
        wanted = "[n]" if count is None else f"[{count}]"
        raise ValueError(f"{name} has shape {values.shape}; give {wanted}, one for each row")


def _check_finite(name: str, values: ndarray) -> None:
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise ValueError(
            f"{name}[{row}] = {values[row].tolist()} is not finite; leave such detections out, or find where they arise"
        )
