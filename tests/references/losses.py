"""Losses and their gradients in float64, one number at a time, from the formulas of the paper."""

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
