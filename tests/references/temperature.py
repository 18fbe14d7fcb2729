"""Factors on stds by search instead of by formula; plain loops."""

import math


def smallest_covering_factor(errors, stds, *, share):
    """The smallest of the factors that put a label just within one std, which has `share` of all within."""
    for factor in sorted(abs(error) / std for error, std in zip(errors, stds, strict=True)):
        within = sum(
            abs(error) / std <= factor for error, std in zip(errors, stds, strict=True)
        )  # as distances: multiplying back would round
        if within >= share * len(errors):
            return factor
    return None


def likeliest_factor(errors, stds, *, low=1e-3, high=1e3, rounds=200):
    """The minimum of the mean negative log likelihood, by ternary search over the factor's logarithm."""

    def nll(log_factor):
        total = 0.0
        for error, std in zip(errors, stds, strict=True):
            scaled = math.exp(log_factor) * std
            total += math.log(scaled) + 0.5 * (error / scaled) ** 2
        return total

    low, high = math.log(low), math.log(high)
    for _ in range(rounds):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if nll(left) < nll(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)
