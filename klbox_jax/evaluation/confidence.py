"""Confidence intervals: Student's for a mean, and a bootstrap for the ratio of two medians."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

CONFIDENCE = 0.95
RATIO_RESAMPLES = 2000


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns Student's interval of the mean at `CONFIDENCE`, low and high; None for fewer than two values.

    The values are taken as independent and normal.
    """
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def percentile_interval(draws: Float[ndarray, " S"]) -> tuple[float, float]:
    """Returns the central interval that holds the share `CONFIDENCE` of the draws, low and high."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def ratio_of_medians(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Returns the median of `ours` over the median of `peer`."""
    return float(np.median(ours) / np.median(peer))


def ratio_interval(ours: Sequence[float], peer: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Returns the bootstrap interval of `ratio_of_medians`, from pairs drawn with replacement.

    Pairs are drawn whole, as they were measured: what slowed the machine slowed both.
    """
    draws = np.random.default_rng(seed).integers(0, len(ours), (RATIO_RESAMPLES, len(ours)))
    return percentile_interval(
        np.median(np.asarray(ours)[draws], axis=1) / np.median(np.asarray(peer)[draws], axis=1)
    )
