"""Calibration of predicted stds: coverage, calibration curve, ECE and ENCE.

Arrays of errors (prediction minus label) and stds are over edges, in pixels; stds must be positive. A score of an
empty array is None.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import ndtr

# The levels of probdet: 1/15, ..., 14/15.
LEVELS = np.arange(1, 15) / 15


def coverage(errors: Float[ndarray, "*n"], stds: Float[ndarray, "*n"], *, sigmas: float) -> float | None:
    """Returns the share of labels at most `sigmas` stds from the prediction.

    A calibrated Gaussian has .6827, .9545, .9973 at 1, 2, 3 sigmas.
    """
    return float(np.mean(np.abs(errors) <= sigmas * stds)) if errors.size else None


def calibration_curve(errors: Float[ndarray, " n"], stds: Float[ndarray, " n"]) -> Float[ndarray, " 14"]:
    """Returns the share of labels below the predicted quantile of each of `LEVELS`; equal to them if calibrated.

    Kuleshov et al. (2018). Call it for one edge at a time: with edges pooled, opposite biases of x1 and x2 would look
    like stds that are too small. NaN if there are no labels.
    """
    levels = ndtr(-errors / stds)  # error is prediction minus label, so the label is at minus the error
    below = (levels[:, None] < LEVELS[None, :]).sum(axis=0)
    return below / len(errors) if len(errors) else np.full(len(LEVELS), np.nan)


def calibration_errors(errors: Float[ndarray, "n 4"], stds: Float[ndarray, "n 4"]) -> dict:
    """Computes the gaps between the calibration curve and the levels, averaged over the four edges.

    Returns:
        `ECE_squared` and `MCE_squared`, mean and largest squared gap over the levels (probdet's expected and maximum
        calibration error); `ECE` and `MCE`, the same with absolute gaps; `curve`, the four curves by edge name.
        All None if there are no labels.
    """
    if not len(errors):
        return dict.fromkeys(("ECE_squared", "MCE_squared", "ECE", "MCE", "curve"))
    curves = np.stack([calibration_curve(errors[:, edge], stds[:, edge]) for edge in range(4)])
    gaps = np.abs(curves - LEVELS)
    return {
        "ECE_squared": float((gaps**2).mean()),
        "MCE_squared": float((gaps**2).max(axis=1).mean()),
        "ECE": float(gaps.mean()),
        "MCE": float(gaps.max(axis=1).mean()),
        "curve": dict(zip(("x1", "y1", "x2", "y2"), curves.tolist(), strict=True)),
    }


def expected_normalized_calibration_error(
    errors: Float[ndarray, " n"], stds: Float[ndarray, " n"], *, num_bins: int = 10
) -> float | None:
    """Computes ENCE: mean over bins of |RMS of the stds - RMS of the errors| / RMS of the stds.

    Levi et al. (2022). Edges are sorted by std and split into bins of equal count; with fewer edges than bins, each
    edge is a bin. By chance alone, a calibrated bin of n edges has about 1 / sqrt(pi n).
    """
    if not len(errors):
        return None
    order = np.argsort(stds, kind="stable")
    terms = []
    for rows in np.array_split(order, min(num_bins, len(order))):
        predicted, found = np.sqrt(np.mean(stds[rows] ** 2)), np.sqrt(np.mean(errors[rows] ** 2))
        terms.append(abs(predicted - found) / predicted)
    return float(np.mean(terms))
