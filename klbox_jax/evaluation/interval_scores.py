"""Proper scores of intervals, quantiles and distributions, and coverage with mean width by group.

Lower is better for every score, and none can be improved by stating something other than what one believes (Gneiting &
Raftery 2007). Errors are label minus prediction. A score over nothing is None.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import ndtr

# Bounds of COCO's sizes, in pixels of area: small is below the first and large from the second on.
_SIZE_AREAS = (32.0**2, 96.0**2)
SIZES = ("small", "medium", "large")


def interval_score(
    errors: Float[ndarray, "*n"],
    lower: Float[ndarray, "*n"],
    upper: Float[ndarray, "*n"],
    *,
    coverage: float,
) -> Float[ndarray, "*n"]:
    """Interval score of each edge: width + (2 / a) times the distance by which the label is outside, a = 1 - coverage.

    Args:
        errors: label minus prediction, in pixels.
        lower, upper: how far the interval reaches below and above the prediction, in pixels; equal if symmetric.
        coverage: of one edge. For four edges that share the miss probability of a box, 1 - (1 - coverage) / 4.
    """
    outside = np.maximum(-lower - errors, 0.0) + np.maximum(errors - upper, 0.0)
    return lower + upper + 2 / (1 - coverage) * outside


def pinball_loss(
    errors: Float[ndarray, "*n"], quantiles: Float[ndarray, "*n"], *, level: float
) -> Float[ndarray, "*n"]:
    """Pinball loss of each predicted quantile: level (y - q) above it, (1 - level) (q - y) below.

    The interval score is (2 / a) times the sum of the pinball losses of its ends, at a / 2 and 1 - a / 2.
    """
    above = errors - quantiles
    return np.maximum(level * above, (level - 1) * above)


def gaussian_crps(errors: Float[ndarray, "*n"], stds: Float[ndarray, "*n"]) -> Float[ndarray, "*n"]:
    """Continuous ranked probability score of N(0, stds^2) at each error, in pixels; stds must be positive.

    s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) with z = error / s.
    """
    z = errors / stds
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return stds * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))


def empirical_crps(values: Float[ndarray, " m"], draws: Float[ndarray, " n"]) -> Float[ndarray, " m"]:
    """Continuous ranked probability score of an empirical distribution at each value: E|X - y| - E|X - X'| / 2.

    X and X' are independent and uniform over the draws, so X' may be the same draw.
    """
    draws = np.sort(draws)
    n = len(draws)
    sums = np.concatenate([[0.0], np.cumsum(draws)])
    below = np.searchsorted(draws, values)
    distance = values * below - sums[below] + (sums[n] - sums[below]) - values * (n - below)
    spread = 2 * ((2 * np.arange(1, n + 1) - n - 1) * draws).sum() / n**2
    return distance / n - 0.5 * spread


def calibrated_crps(
    errors: Float[ndarray, "m 4"], scales: Float[ndarray, "m 4"], ratios: Float[ndarray, "n 4"]
) -> Float[ndarray, "m 4"]:
    """CRPS of the calibrated distribution of each edge, in pixels.

    The calibrated distribution is the one that conformal intervals take their quantiles from: prediction + scale times
    a ratio drawn from those of the calibration set.

    Args:
        errors, scales: of the detections that are scored.
        ratios: error / scale of the calibration set.
    """
    standard = errors / scales
    return scales * np.stack(
        [empirical_crps(standard[:, edge], ratios[:, edge]) for edge in range(4)], axis=1
    )


def summarize_intervals(
    errors: Float[ndarray, "n 4"],
    lower: Float[ndarray, "n 4"],
    upper: Float[ndarray, "n 4"],
    image_ids: ndarray,
    *,
    coverage: float,
    edges_at_once: int = 4,
) -> dict[str, Any]:
    """Coverage, width and interval score of matched detections.

    Args:
        errors: label minus prediction, in pixels.
        lower, upper: half widths; infinite ones count as covered.
        image_ids: image of each row.
        coverage: that was asked.
        edges_at_once: 4 where the coverage is of a box, so that each edge is scored at a miss probability of a / 4; 1
            where it is of an edge.

    Returns:
        `num`, `num_images`, `num_infinite` (boxes with an edge without bound). `coverage`: share of boxes with all four
        edges covered. `coverage_edge` and `coverage_by_edge`: of edges, and of each of the four. `coverage_image`:
        share of images with all of their boxes covered. `coverage_image_mean`: share of covered boxes of an image,
        averaged over images. `mean_width` and `interval_score`: per edge in pixels, None where an interval is infinite.
    """
    num = len(errors)
    images, index = np.unique(image_ids, return_inverse=True)
    inside = (errors >= -lower) & (errors <= upper)
    boxes = inside.all(axis=1)
    finite = np.isfinite(lower).all(axis=1) & np.isfinite(upper).all(axis=1)
    found: dict[str, Any] = {
        "num": num,
        "num_images": len(images),
        "num_infinite": int((~finite).sum()),
    }
    names = ("coverage", "coverage_edge", "coverage_by_edge", "coverage_image", "coverage_image_mean")
    if not num:
        return found | dict.fromkeys((*names, "mean_width", "interval_score"))
    shares = np.bincount(index, boxes) / np.bincount(index)
    found |= {
        "coverage": float(boxes.mean()),
        "coverage_edge": float(inside.mean()),
        "coverage_by_edge": inside.mean(axis=0).tolist(),
        "coverage_image": float((shares == 1).mean()),
        "coverage_image_mean": float(shares.mean()),
        "mean_width": None,
        "interval_score": None,
    }
    if finite.all():
        scores = interval_score(errors, lower, upper, coverage=1 - (1 - coverage) / edges_at_once)
        found |= {"mean_width": float((lower + upper).mean()), "interval_score": float(scores.mean())}
    return found


def summarize_by_group(
    groups: ndarray,
    errors: Float[ndarray, "n 4"],
    lower: Float[ndarray, "n 4"],
    upper: Float[ndarray, "n 4"],
    image_ids: ndarray,
    *,
    coverage: float,
) -> dict[Any, dict[str, Any]]:
    """Returns `summarize_intervals` of each group of rows: sizes, classes, or bins of the score.

    Args:
        groups: the group of each row, see `coco_sizes` and `score_bins`.
    """
    return {
        group: summarize_intervals(
            *(rows[groups == group] for rows in (errors, lower, upper, image_ids)), coverage=coverage
        )
        for group in np.unique(groups).tolist()
    }


def coco_sizes(boxes: Float[ndarray, "n 4"]) -> ndarray:
    """Returns `small`, `medium` or `large` of each box `x1, y1, x2, y2`: areas below 32^2, below 96^2, the rest."""
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=1)
    return np.array(SIZES)[np.searchsorted(_SIZE_AREAS, areas, side="right")]


def score_bins(scores: Float[ndarray, " n"], *, num_bins: int = 5) -> Int[ndarray, " n"]:
    """Returns the bin of each score, 0 to `num_bins` - 1, of equal width over 0 to 1; bin b is (b / B, (b + 1) / B]."""
    return np.searchsorted(np.linspace(0.0, 1.0, num_bins + 1)[1:-1], scores)
