"""Proper scoring rules of predicted Gaussians: likelihood, entropy and energy score.

Arrays of errors (prediction minus label) and stds have a row for each box and a column for each edge; the
edges of a box are treated as independent.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

# Nodes of a double-exponential quadrature over t = exp(2 sinh v): both tails of the integrand are below
# 1e-12 at the ends, and half the step or a longer range changes no result by more than 1e-12 relative.
_STEP = 0.05
_NODES = np.arange(-4.2, 4.2 + _STEP / 2, _STEP)
_ROWS_AT_ONCE = 2048  # about 11 MB for each temporary array


def gaussian_nll(errors: Float[ndarray, "*n"], stds: Float[ndarray, "*n"]) -> Float[ndarray, "*n"]:
    """Returns the negative log density of each error under a Gaussian of mean 0, in nats; stds must be positive."""
    return 0.5 * np.log(2 * np.pi * stds**2) + 0.5 * (errors / stds) ** 2


def gaussian_entropy(stds: Float[ndarray, "*n"]) -> Float[ndarray, "*n"]:
    """Returns the differential entropy of each Gaussian in nats: the expected `gaussian_nll` if the stds are right."""
    return 0.5 * np.log(2 * np.pi * np.e * stds**2)


def energy_score(errors: Float[ndarray, "n 4"], stds: Float[ndarray, "n 4"]) -> Float[ndarray, " n"]:
    """Computes the energy score of each box in pixels: E|z - y| - E|z - z'| / 2, Euclidean over the four edges.

    z and z' are independent draws from the prediction, y is the label (Gneiting & Raftery 2007). probdet estimates the
    same score from 1000 draws; here both expectations are integrals. Lower is better.
    """
    return expected_norm(errors, stds) - 0.5 * expected_norm(np.zeros_like(errors), np.sqrt(2.0) * stds)


def expected_norm(means: Float[ndarray, "n d"], stds: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
    """Computes E|x| of each row, for x ~ N(means, diag(stds^2)).

    From sqrt(q) = (1 / (2 sqrt(pi))) int_0^inf (1 - exp(-t q)) t^(-3/2) dt with q = |x|^2, whose
    E exp(-t q) is the product over axes of exp(-m^2 t / (1 + 2 s^2 t)) / sqrt(1 + 2 s^2 t).
    """
    scale = np.sqrt((means**2 + stds**2).sum(axis=1))  # the integral is computed in units of it
    safe = np.where(scale > 0, scale, 1.0)[:, None]
    means, variances = means / safe, (stds / safe) ** 2
    t = np.exp(2 * np.sinh(_NODES))
    # dt / t^(3/2) = exp(-sinh v) 2 cosh v dv
    weights = _STEP / np.sqrt(np.pi) * np.cosh(_NODES) * np.exp(-np.sinh(_NODES))
    norms = np.empty(len(means))
    for start in range(0, len(means), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        growth = 2 * variances[rows, :, None] * t
        exponents = (means[rows, :, None] ** 2 * t / (1 + growth) + 0.5 * np.log1p(growth)).sum(axis=1)
        norms[rows] = -np.expm1(-exponents) @ weights
    return scale * norms
