"""The ratio of two medians, and how far chance may have moved it."""

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95


def ratio_of_medians(ours: tuple[float, ...], peer: tuple[float, ...]) -> float:
    """Returns the median of ours over the median of the peer's."""
    return float(np.median(ours) / np.median(peer))


def ratio_interval(ours: tuple[float, ...], peer: tuple[float, ...], *, seed: int = 0) -> tuple[float, float]:
    """Returns the bootstrap interval of `ratio_of_medians`: 95 % of it, over pairs drawn with replacement.

    Pairs are drawn whole, as they were run: what slowed the machine slowed both.
    """
    draws = np.random.default_rng(seed).integers(0, len(ours), (RESAMPLES, len(ours)))
    ratios = np.median(np.asarray(ours)[draws], axis=1) / np.median(np.asarray(peer)[draws], axis=1)
    low, high = np.quantile(ratios, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
