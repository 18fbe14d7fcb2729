"""Ranks and order statistics of split conformal prediction, in whole numbers.

A column is one number for each calibration item (a box, or an image), for example the largest |error| / sigma of a box.
Exact arithmetic matters: in floats, ceil((n + 1) coverage) is one too high at round n, or the interval is infinite.
"""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

MULTIPLICITIES = ("max", "bonferroni", "sidak", "max_rank", "edge")
NUM_EDGES = 4


def exact_fraction(number: float) -> Fraction:
    """Returns the number as it is written in decimal: 0.9 is 9/10, and so is 0.1 * 9 = 0.9000000000000001."""
    return Fraction(str(float(number))).limit_denominator(10**9)


def conformal_rank(
    count: int, coverage: Fraction, *, multiplicity: str = "max", asymmetric: bool = False
) -> int:
    """Returns the rank of the order statistic that bounds a column; above `count` there is no finite bound.

    With two sides of a column apart (`asymmetric`), each side gets half of the miss probability a = 1 - coverage.

    Args:
        count: number of calibration items n.
        coverage: between 0 and 1, exact.
        multiplicity: `max` and `edge`: ceil((n + 1)(1 - a)), one column for all edges or each edge by itself;
            `bonferroni`: a / 4 for each edge; `sidak`: coverage^(1/4) for each edge; `max_rank`: ceil((n + 1)(1 - a))
            of the largest ranks, see `max_rank_bounds`, which corrects for all columns, so that a is not halved.
        asymmetric: True for bounds of the two sides apart.
    """
    if multiplicity == "sidak":
        return _sidak_rank(count, coverage, 2 if asymmetric else 1)
    return math.ceil((count + 1) * (1 - (1 - coverage) / _parts(multiplicity, asymmetric)))


def labels_needed(coverage: Fraction, *, multiplicity: str = "max", asymmetric: bool = False) -> int:
    """Returns the smallest count that gives a finite bound; for `max_rank`, whatever the ranks are."""
    if multiplicity == "sidak":
        sides = 2 if asymmetric else 1
        count = math.floor(sides / (1 - float(coverage) ** (1 / NUM_EDGES))) - 2
        while _sidak_rank(max(count, 1), coverage, sides) > count:
            count += 1
        return count
    # ceil((n + 1)(1 - a / parts)) <= n holds from n + 1 >= parts / a on. In `max_rank_bounds` only an item with the
    # largest number of another column exceeds n. There are 3 at most (7 with both sides), so n - 3 >= rank is enough,
    # which is n + 1 >= 4 / a.
    parts = _parts("bonferroni" if multiplicity == "max_rank" else multiplicity, asymmetric)
    return math.ceil(parts / (1 - coverage)) - 1


def _parts(multiplicity: str, asymmetric: bool) -> int:
    """The number of equal parts that the miss probability is cut into, one for each column."""
    sides = 2 if asymmetric else 1
    return {"max": sides, "edge": sides, "bonferroni": NUM_EDGES * sides, "max_rank": 1}[multiplicity]


def _sidak_rank(count: int, coverage: Fraction, sides: int) -> int:
    """The smallest k with (1 - sides (1 - k / (n + 1)))^4 >= coverage; the fourth root itself is irrational."""

    def holds(rank: int) -> bool:
        inside = count + 1 - sides * (count + 1 - rank)
        return inside >= 0 and inside**NUM_EDGES * coverage.denominator >= coverage.numerator * power

    power = (count + 1) ** NUM_EDGES
    rank = math.ceil((count + 1) * (1 - (1 - float(coverage) ** (1 / NUM_EDGES)) / sides))
    while holds(rank - 1):
        rank -= 1
    while not holds(rank):
        rank += 1
    return rank


def order_statistics(columns: Float[ndarray, "n C"], rank: int) -> Float[ndarray, " C"]:
    """Returns the `rank`-th smallest number of each column; infinity where the rank exceeds n."""
    if rank > len(columns):
        return np.full(columns.shape[1], np.inf)
    return np.partition(columns, rank - 1, axis=0)[rank - 1]


def max_rank_bounds(columns: Float[ndarray, "n C"], rank: int) -> Float[ndarray, " C"]:
    """Returns bounds that hold for all columns of an item at once, from ranks instead of values.

    The idea is the max-rank correction (Timans et al., ECCV 2024): columns of unlike scale or tail count alike. The
    authors take the `rank`-th smallest of the items' largest ranks. That covers too little for small n: among 20 items
    with 4 independent edges it is nearly always the largest rank, and the four maxima hold together for only 82 % of
    new items. Here a new item is one of the n + 1 that are ranked, and it raises the ranks of others by at most 1. So
    column c is bounded by its order statistic of rank T_c, the `rank`-th smallest over items of
    max(rank in c, 1 + largest rank in the others). A single column gives `order_statistics`.
    """
    count, width = columns.shape
    if rank > count:
        return np.full(width, np.inf)
    ordered = np.sort(columns, axis=0)
    ranks = np.stack(
        [np.searchsorted(ordered[:, c], columns[:, c]) + 1 for c in range(width)], axis=1
    )  # equal values share the lowest rank
    bounds = np.full(width, np.inf)
    for c in range(width):
        others = np.delete(ranks, c, axis=1).max(axis=1, initial=0)
        bound = np.partition(np.maximum(ranks[:, c], others + 1), rank - 1)[rank - 1]
        if bound <= count:
            bounds[c] = ordered[bound - 1, c]
    return bounds


def image_columns(
    columns: Float[ndarray, "n C"], image_index: Int[ndarray, " n"], missed_share: Fraction
) -> Float[ndarray, "I C"]:
    """Returns for each image and column the smallest bound that at most a share of its boxes exceeds.

    Args:
        columns: numbers of boxes.
        image_index: image of each box, 0 to I - 1; every image has a box.
        missed_share: from 0 (the largest number of the image) to below 1.
    """
    counts = np.bincount(image_index)
    allowed = np.array([math.floor(missed_share * count) for count in counts.tolist()])
    places = np.cumsum(counts) - counts + allowed
    found = [column[np.lexsort((-column, image_index))][places] for column in columns.T]
    return np.stack(found, axis=1)


def risk_bounds(
    columns: Float[ndarray, "n C"], image_index: Int[ndarray, " n"], risk: Fraction
) -> Float[ndarray, " C"]:
    """Returns for each column the bound that conformal risk control gives to the share of an image's boxes above it.

    The smallest L with (I R(L) + 1) / (I + 1) <= risk, where R(L) is the mean over the I images of the share of boxes
    whose number exceeds L (Angelopoulos et al., ICLR 2024). Infinite where I < 1 / risk - 1. In whole numbers: shares
    are counted in units of one over the least common multiple of the images' box counts.
    """
    counts = np.bincount(image_index)
    unit = math.lcm(*set(counts.tolist()))
    budget = (risk * (len(counts) + 1) - 1) * unit
    if budget < 0:
        return np.full(columns.shape[1], np.inf)
    costs = [unit // count for count in counts.tolist()]
    bounds = []
    for column in columns.T:
        missed = 0
        for row in np.argsort(-column, kind="stable").tolist():
            missed += costs[image_index[row]]
            if missed > budget:
                bounds.append(column[row])
                break
    return np.array(bounds)
