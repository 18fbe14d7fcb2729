"""Losses and their gradients in float64, one number at a time, from the formulas of the papers."""

import itertools
import math

import numpy as np


def smooth_l1(error, beta):
    error = abs(error)
    if error < beta:
        return error**2 / (2 * beta)
    return error - beta / 2


def kl_loss(delta, log_var, target, low=-7.0, high=7.0):
    """(loss, sum of its absolute terms, d loss / d delta, d loss / d log_var), alpha inside its range."""
    alpha = min(max(log_var, low), high)
    error = target - delta
    if abs(error) <= 1:
        data = math.exp(-alpha) * error**2 / 2
        d_delta = (delta - target) / math.exp(alpha)
    else:
        data = math.exp(-alpha) * (abs(error) - 0.5)
        d_delta = math.copysign(math.exp(-alpha), delta - target)
    return data + alpha / 2, data + abs(alpha) / 2, d_delta, 0.5 - data


def kl_losses(deltas, log_vars, targets):
    """`kl_loss` of flat arrays, as four arrays."""
    rows = [kl_loss(float(d), float(a), float(t)) for d, a, t in zip(deltas, log_vars, targets, strict=True)]
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def binary_cross_entropy(logit, label):
    probability = 1 / (1 + math.exp(-logit))
    return -(label * math.log(probability) + (1 - label) * math.log(1 - probability))


def softmax_cross_entropy(logits, class_index):
    exponentials = [math.exp(value) for value in logits]
    return -math.log(exponentials[class_index] / sum(exponentials))


def kl_loss_note(e, alpha):
    data = math.exp(-alpha) * smooth_l1(e, 1.0)
    return data + alpha, data + abs(alpha)


def gaussian_nll(e, alpha):
    """(loss, sum of its absolute terms): from the density, without the constant that the loss omits."""
    sigma = math.exp(alpha / 2)
    density = math.exp(-0.5 * (e / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    if density > 1e-290:
        loss = -math.log(density) - 0.5 * math.log(2 * math.pi)
    else:
        loss = 0.5 * (e / sigma) ** 2 + math.log(sigma)
    return loss, 0.5 * (e / sigma) ** 2 + abs(math.log(sigma))


def beta_nll(e, alpha, beta):
    weight = math.exp(alpha / 2) ** (2 * beta)
    loss, scale = gaussian_nll(e, alpha)
    return weight * loss, weight * scale


def gaussian_kl(e, alpha, std):
    sigma = math.exp(alpha / 2)
    terms = math.log(sigma / std), (std**2 + e**2) / (2 * sigma**2), -0.5
    return sum(terms), sum(abs(term) for term in terms)


def direct_moment_matching(e, alpha, beta):
    terms = smooth_l1(e, beta), smooth_l1(math.exp(alpha) - e**2, beta)
    return sum(terms), smooth_l1(e, beta) + math.exp(alpha) + e**2


def laplace_nll(e, alpha):
    b = math.sqrt(math.exp(alpha))
    return abs(e) / b + math.log(2 * b), abs(e) / b + abs(math.log(2 * b))


def lasernet_kl(e, alpha, std):
    b_p, b_l = math.sqrt(math.exp(alpha)), std / math.sqrt(2)
    terms = math.log(b_p / b_l), b_l * math.exp(-abs(e) / b_l) / b_p, abs(e) / b_p, -1
    return sum(terms), sum(abs(term) for term in terms)


def energy_score(delta, alpha, target, noise, beta):
    """`noise`: M + 1 standard normal draws."""
    draws = [delta + math.exp(alpha / 2) * float(n) for n in noise]
    count = len(draws) - 1
    to_target = sum(smooth_l1(z - target, beta) for z in draws[:count]) / count
    spread = sum(smooth_l1(draws[i] - draws[i + 1], beta) for i in range(count)) / count
    return 2 * to_target - spread, 2 * to_target + spread


def gaussian_crps(e, alpha):
    """(CRPS, its derivative by the mean, by alpha) of N(delta, exp(alpha)) at delta + e (Gneiting 2005)."""
    sigma = math.exp(alpha / 2)
    w = e / sigma
    density = math.exp(-0.5 * w**2) / math.sqrt(2 * math.pi)
    centred = math.erf(w / math.sqrt(2))  # 2 Phi(w) - 1
    score = sigma * (w * centred + 2 * density - 1 / math.sqrt(math.pi))
    return score, -centred, 0.5 * sigma * (2 * density - 1 / math.sqrt(math.pi))


def gaussian_log_density(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)


def laplace_log_density(x, mean, std):
    b = std / np.sqrt(2)
    return -np.abs(x - mean) / b - np.log(2 * b)


def kl_by_integration(log_density, label, prediction):
    """Integral of `p log(p / q)`; `label` and `prediction` are (mean, std) of p and q.

    Gauss-Legendre on short pieces over 40 stds on both sides of the label; a kink of either density is an
    end of a piece.
    """
    mean, std = label
    ends = np.union1d(mean + std * np.linspace(-40, 40, 641), [prediction[0]])
    ends = ends[(ends >= mean - 40 * std) & (ends <= mean + 40 * std)]
    nodes, weights = np.polynomial.legendre.leggauss(12)
    total = 0.0
    for low, high in itertools.pairwise(ends):
        x = 0.5 * (high + low) + 0.5 * (high - low) * nodes
        log_p, log_q = log_density(x, mean, std), log_density(x, *prediction)
        total += 0.5 * (high - low) * (weights * np.exp(log_p) * (log_p - log_q)).sum()
    return total
