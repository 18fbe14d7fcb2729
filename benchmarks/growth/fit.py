"""Exponents of the growth of a cost with a size, from measured points."""

from collections.abc import Sequence

import numpy as np

# An exponent above this counts as faster growth than that of the size.
MOST_LINEAR = 1.15
# A growing part that is a smaller share of the last cost than this counts as constant.
LEAST_SHARE = 0.1
# Exponents that are tried for the part that grows.
EXPONENTS = np.arange(0.1, 3.001, 0.01)


def fit_growth(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, float | None]:
    """Returns three exponents of costs at sizes; 1 is linear.

    `exponent` is the slope of the least-squares line through the logarithms of all points, `last_doubling` the slope
    between the last two points, where the constant part weighs least. `beyond_constant` is `p` of the best
    `c + a * size^p` with `c` and `a` not negative, by the squared relative errors; None where that part is below
    `LEAST_SHARE` of the last cost.

    Raises ValueError if there are fewer than three points, the sizes do not ascend, or a cost is not positive.
    """
    x, y = np.asarray(sizes, float), np.asarray(costs, float)
    if len(x) < 3 or len(x) != len(y) or (np.diff(x) <= 0).any() or not (y > 0).all():
        raise ValueError(f"a growth needs three ascending sizes and positive costs, not {sizes} and {costs}")
    log_x, log_y = np.log(x), np.log(y)
    return {
        "exponent": float(np.polyfit(log_x, log_y, 1)[0]),
        "last_doubling": float((log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])),
        "beyond_constant": _beyond_constant(x / x[-1], y / y[-1]),
    }


def _beyond_constant(x: np.ndarray, y: np.ndarray) -> float | None:
    """The exponent of the part that grows; sizes and costs are in units of the last ones."""
    best = (np.inf, 0.0, 0.0)
    for p in EXPONENTS:
        # Relative errors: each row is divided by its cost.
        columns = np.stack([1 / y, x**p / y], axis=1)
        constant, factor = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
        if constant < 0:
            constant, factor = 0.0, (columns[:, 1] / (columns[:, 1] @ columns[:, 1])).sum()
        if factor <= 0:
            constant, factor = y.mean(), 0.0
        error = float(np.square(columns @ np.array([constant, factor]) - 1).sum())
        if error < best[0]:
            best = (error, float(p), float(factor))
    _, p, factor = best
    return p if factor >= LEAST_SHARE else None
