"""Whether predicted stds have the right order: rank correlation, sparsification, the worst edge of a box.

None of these changes when all stds are multiplied by one number. A score over nothing, or over what has no
order, is None.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

# The worst edge of a box is clear if its true std is at least this multiple of the next one's.
CLEARLY_WORST = 1.5


def spearman(a: Float[ndarray, " n"], b: Float[ndarray, " n"]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None if all of `a` or all of `b` are equal."""
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    # Here, as it takes a fifth of all imports' time, and a training needs it after its last step at the earliest.
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def sparsification_curve(errors: Float[ndarray, " n"], stds: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Mean absolute error of what is left when the k edges of the largest stds are removed, k = 0 to n - 1.

    Edges of equal std go in random order: each counts as their mean.
    """
    values, group = np.unique(stds, return_inverse=True)
    means = np.bincount(group, np.abs(errors), len(values)) / np.bincount(group, minlength=len(values))
    ascending = np.sort(group)
    return (np.cumsum(means[ascending]) / np.arange(1, len(errors) + 1))[::-1]


def area_under_sparsification_error(errors: Float[ndarray, " n"], stds: Float[ndarray, " n"]) -> float | None:
    """AUSE: area between the sparsification curve and that of the oracle, which removes the largest error.

    Ilg et al. (2018): both curves are divided by the mean absolute error of all edges, and run over the
    removed share from 0 to 1. 0 for stds in the order of the errors; None if there is no error at all.
    """
    magnitudes = np.abs(errors)
    if not magnitudes.any():
        return None
    gap = sparsification_curve(errors, stds) - sparsification_curve(errors, magnitudes)
    return float(gap.mean() / magnitudes.mean())


def worst_edge_share(
    stds: Float[ndarray, "n 4"], true_stds: Float[ndarray, "n 4"]
) -> tuple[float | None, int]:
    """Among boxes with one clearly worst edge, the share in which the largest predicted std is that edge's.

    Clearly worst: its true std is at least `CLEARLY_WORST` times the second largest of the box. A guess is
    right in a quarter. Equal largest predictions share the box between them.

    Returns:
        The share, and how many such boxes there are.
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
