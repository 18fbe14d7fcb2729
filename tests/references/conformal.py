"""Split conformal prediction written from the definitions: plain loops, exact fractions, exhaustive search."""

import itertools
import math
from decimal import Decimal
from fractions import Fraction


def rank(count, coverage):
    """Smallest whole k with k / (n + 1) >= coverage; the coverage is a text, and numbers are decimal."""
    k = 0
    while Decimal(k) < (count + 1) * Decimal(coverage):
        k += 1
    return k


def quantile(values, k):
    """The k-th smallest; infinite above the count."""
    return math.inf if k > len(values) else sorted(values)[k - 1]


def largest_ratios(errors, scales):
    found = []
    for error_row, scale_row in zip(errors, scales, strict=True):
        found.append(max(abs(e) / s for e, s in zip(error_row, scale_row, strict=True)))
    return found


def by_image(values, image_ids):
    images = {}
    for value, image in zip(values, image_ids, strict=True):
        images.setdefault(image, []).append(value)
    return list(images.values())


def bound_of_image(values, missed_share):
    """Smallest of an image's numbers that at most a share of them exceeds."""
    for bound in sorted(values):
        if sum(value > bound for value in values) <= Fraction(missed_share) * len(values):
            return bound
    return None


def risk_bound(values, image_ids, risk):
    """Smallest bound L among the numbers with (I R(L) + 1) / (I + 1) <= risk, every candidate tried."""
    images = by_image(values, image_ids)
    for bound in sorted(values):
        total = sum(Fraction(sum(v > bound for v in image), len(image)) for image in images)
        if (total + 1) / (len(images) + 1) <= Fraction(risk):
            return bound
    return math.inf


def max_rank_places(rows, k):
    """The largest rank, in each column, of a new row that the symmetric rule accepts, over every way to place it.

    A new row is inserted at every combination of places. All n + 1 rows are ranked. The rule accepts the rows whose
    largest rank is at most the smallest number that k rows or more reach.
    """
    count, width = len(rows), len(rows[0])
    columns = [sorted(row[c] for row in rows) for c in range(width)]
    places = [[1 + columns[c].index(row[c]) for c in range(width)] for row in rows]
    best = [0] * width
    for new in itertools.product(range(1, count + 2), repeat=width):
        largest = [max(p + (p >= q) for p, q in zip(own, new, strict=True)) for own in places]
        own = max(new)
        everyone = sorted([*largest, own])
        if own <= everyone[k - 1]:
            best = [max(b, q) for b, q in zip(best, new, strict=True)]
    return best


def interval_score(label, low, high, alpha):
    if label < low:
        return high - low + 2 / alpha * (low - label)
    if label > high:
        return high - low + 2 / alpha * (label - high)
    return high - low


def crps(cdf, value, *, low, high, steps=40_000):
    """Integral of (cdf(x) - 1[x >= value])^2 by the midpoint rule, in two parts that meet at the value."""
    total = 0.0
    for start, stop, step in ((low, value, 0.0), (value, high, 1.0)):
        width = (stop - start) / steps
        for i in range(steps):
            total += width * (cdf(start + (i + 0.5) * width) - step) ** 2
    return total
