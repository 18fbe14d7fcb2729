import math

import numpy as np
import pytest

from klbox_jax.evaluation.scoring_rules import energy_score, expected_norm, gaussian_entropy, gaussian_nll


def test_likelihood_by_hand():
    # Density of N(0, 2^2) at 3: exp(-9/8) / (2 sqrt(2 pi)).
    density = math.exp(-9 / 8) / (2 * math.sqrt(2 * math.pi))
    nll = gaussian_nll(np.array([3.0, -3.0]), np.array([2.0, 2.0]))
    np.testing.assert_allclose(nll, -math.log(density))


def test_entropy_is_the_expected_likelihood():
    rng = np.random.default_rng(0)
    stds = np.exp(rng.normal(0, 1, 100_000))
    surprise = gaussian_nll(rng.normal(0, stds), stds) - gaussian_entropy(stds)
    # A mean of (z^2 - 1) / 2, of std 1 / sqrt(2).
    assert abs(surprise.mean()) < 4 / math.sqrt(2 * len(stds))


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_norm_of_standard_normals_is_the_mean_of_chi(d):
    expected = math.sqrt(2) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    np.testing.assert_allclose(expected_norm(np.zeros((1, d)), np.ones((1, d))), expected, rtol=1e-11)


def test_norm_in_the_limits():
    # A certain vector has its own length; one axis alone is a folded normal, s sqrt(2 / pi) for mean 0.
    certain = expected_norm(np.array([[3.0, 0.0, 0.0, 4.0], [0.0] * 4]), np.zeros((2, 4)))
    np.testing.assert_allclose(certain, [5, 0], rtol=1e-11)
    folded = expected_norm(np.array([[7.0, 0.0]]), np.array([[3.0, 0.0]]))
    tail = 7 * math.erf(7 / 3 / math.sqrt(2)) + 3 * math.sqrt(2 / math.pi) * math.exp(-49 / 18)
    np.testing.assert_allclose(folded, tail, rtol=1e-10)


def test_norm_agrees_with_samples_over_many_scales():
    rng = np.random.default_rng(1)
    means = rng.normal(0, 1, (30, 4)) * 10 ** rng.uniform(-3, 3, (30, 1))
    stds = 10 ** rng.uniform(-2, 2, (30, 4))
    draws = np.linalg.norm(rng.normal(means, stds, (20_000, 30, 4)), axis=2)
    standard_error = draws.std(axis=0) / math.sqrt(len(draws))
    assert (np.abs(expected_norm(means, stds) - draws.mean(axis=0)) < 4 * standard_error).all()


def test_rows_do_not_depend_on_how_many_there_are():
    rng = np.random.default_rng(2)
    means, stds = rng.normal(0, 3, (5000, 4)), np.exp(rng.normal(0, 1, (5000, 4)))
    together = expected_norm(means, stds)
    rows = np.array([0, 2047, 2048, 4999])
    np.testing.assert_allclose(together[rows], expected_norm(means[rows], stds[rows]), rtol=1e-13)
    assert expected_norm(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)


def test_energy_score_as_probdet_samples_it():
    # 1001 draws; neighbouring draws are the independent pairs.
    rng = np.random.default_rng(3)
    errors, stds = rng.normal(0, 4, (200, 4)), np.exp(rng.normal(0, 1, (200, 4)))
    draws = rng.normal(errors, stds, (1001, 200, 4))  # prediction minus label, around the error
    sampled = np.linalg.norm(draws[:-1], axis=2).mean(0)
    sampled -= 0.5 * np.linalg.norm(draws[1:] - draws[:-1], axis=2).mean(0)
    scores = energy_score(errors, stds)
    np.testing.assert_allclose(scores.mean(), sampled.mean(), rtol=0.02)
    assert (np.abs(scores - sampled) < 0.2 * stds.max(axis=1)).all()


def test_energy_score_is_proper():
    # The std that the errors were drawn with scores best.
    errors = np.random.default_rng(4).normal(0, 2, (4000, 4))
    means = [energy_score(errors, np.full_like(errors, std)).mean() for std in (1.0, 1.6, 2.0, 2.5, 4.0)]
    assert np.argmin(means) == 2


def test_energy_score_of_a_certain_box_is_its_distance():
    errors = np.array([[1.0, 2.0, 2.0, 4.0]])
    np.testing.assert_allclose(energy_score(errors, np.zeros((1, 4))), 5.0, rtol=1e-11)
