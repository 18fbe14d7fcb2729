"""Ranking quality of predicted stds: rank correlation, sparsification (AUSE), worst edge of a box.

None of these changes if all stds are multiplied by one number. A score of an empty array, or of equal values, which
have no order, is None.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

# The worst edge of a box is clear if its true std is at least this multiple of the second largest.
CLEARLY_WORST = 1.5


def spearman(a: Float[ndarray, " n"], b: Float[ndarray, " n"]) -> float | None:
    """Returns Spearman's rank correlation (ties get their mean rank); None if all of `a` or all of `b` are equal."""
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    # Imported here: it takes a fifth of the import time of a training, which needs it only after its last step.
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def sparsification_curve(errors: Float[ndarray, " n"], stds: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Returns the mean absolute error without the k edges of the largest stds, for k = 0 to n - 1.

    Edges of equal std would be removed in random order, so each counts as their mean.
    """
    values, group = np.unique(stds, return_inverse=True)
    means = np.bincount(group, np.abs(errors), len(values)) / np.bincount(group, minlength=len(values))
    ascending = np.sort(group)
    return (np.cumsum(means[ascending]) / np.arange(1, len(errors) + 1))[::-1]


def area_under_sparsification_error(errors: Float[ndarray, " n"], stds: Float[ndarray, " n"]) -> float | None:
    """Computes AUSE: area between the sparsification curve and the oracle's, which removes the largest error first.

    Ilg et al. (2018): both curves are divided by the mean absolute error of all edges, over the removed share from 0
    to 1. 0 if the stds have the order of the errors; None if all errors are 0.
    """
    magnitudes = np.abs(errors)
    if not magnitudes.any():
        return None
    gap = sparsification_curve(errors, stds) - sparsification_curve(errors, magnitudes)
    return float(gap.mean() / magnitudes.mean())


def worst_edge_share(
    stds: Float[ndarray, "n 4"], true_stds: Float[ndarray, "n 4"]
) -> tuple[float | None, int]:
    """Computes the share of boxes whose clearly worst edge has the largest predicted std.

    An edge is clearly worst if its true std is at least `CLEARLY_WORST` times the second largest of the box. Guessing
    gives 1/4. Of k equal largest predictions each counts 1/k.

    Returns:
        The share (None without such boxes) and the number of boxes with a clearly worst edge.
    """
    ordered = np.sort(true_stds, axis=1)
    is_clear = (ordered[:, 3] > 0) & (ordered[:, 3] >= CLEARLY_WORST * ordered[:, 2])
    count = int(is_clear.sum())
    if count == 0:
        return None, 0
    largest = stds[is_clear] == stds[is_clear].max(axis=1, keepdims=True)
    worst = np.argmax(true_stds[is_clear], axis=1)
    credit = largest[np.arange(count), worst] / largest.sum(axis=1)
    return float(credit.mean()), count
