import math

import numpy as np
import pytest

from klbox_jax.evaluation.interval_scores import (
    calibrated_crps,
    coco_sizes,
    empirical_crps,
    gaussian_crps,
    interval_score,
    pinball_loss,
    score_bins,
    summarize_by_group,
    summarize_intervals,
)
from tests.references import conformal as reference


def test_interval_score_agrees_with_the_definition():
    rng = np.random.default_rng(0)
    errors, lower, upper = rng.normal(0, 3, (50, 4)), rng.uniform(0, 3, (50, 4)), rng.uniform(0, 3, (50, 4))
    found = interval_score(errors, lower, upper, coverage=0.8)
    for place in np.ndindex(50, 4):
        expected = reference.interval_score(errors[place], -lower[place], upper[place], 0.2)
        assert found[place] == pytest.approx(expected)


def test_interval_score_is_the_pinball_loss_of_both_ends():
    rng = np.random.default_rng(1)
    errors, low, high = rng.normal(0, 2, 200), rng.uniform(-2, 0, 200), rng.uniform(0, 2, 200)
    losses = pinball_loss(errors, low, level=0.05) + pinball_loss(errors, high, level=0.95)
    np.testing.assert_allclose(interval_score(errors, -low, high, coverage=0.9), 2 / 0.1 * losses)
    # By hand: 3 above a quantile of level .9, and 2 below it.
    np.testing.assert_allclose(
        pinball_loss(np.array([4.0, -1.0]), np.array([1.0, 1.0]), level=0.9), [2.7, 0.2]
    )


@pytest.mark.parametrize("score", ["interval", "pinball", "gaussian"])
def test_the_true_distribution_scores_best(score):
    errors = np.random.default_rng(2).normal(0, 2, 40_000)

    def mean_score(scale):
        stds = np.full_like(errors, 2 * scale)
        if score == "interval":
            half = 1.6448536 * stds
            return interval_score(errors, half, half, coverage=0.9).mean()
        if score == "pinball":
            return pinball_loss(errors, 1.2815516 * stds, level=0.9).mean()
        return gaussian_crps(errors, stds).mean()

    assert mean_score(1.0) < min(mean_score(0.8), mean_score(1.25))


@pytest.mark.parametrize(("error", "std"), [(0.0, 1.0), (1.3, 0.4), (-5.0, 2.0), (0.2, 3.0)])
def test_gaussian_crps_agrees_with_numeric_integration(error, std):
    def cdf(x):
        return 0.5 * (1 + math.erf(x / std / math.sqrt(2)))

    expected = reference.crps(cdf, error, low=-30.0, high=30.0)
    assert gaussian_crps(np.array([error]), np.array([std]))[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [-7.0, 0.0, 0.4, 9.0])
def test_empirical_crps_agrees_with_numeric_integration_and_with_pairs(value):
    draws = np.array([-1.0, 0.0, 0.0, 0.5, 3.0])
    found = empirical_crps(np.array([value]), draws)[0]
    expected = reference.crps(lambda x: np.mean(draws <= x), value, low=-10.0, high=10.0, steps=8000)
    assert found == pytest.approx(expected, abs=3e-3)
    pairs = np.abs(draws[:, None] - draws[None, :]).mean()
    assert found == pytest.approx(np.abs(draws - value).mean() - 0.5 * pairs)


def test_calibrated_crps_nears_the_gaussian_one_for_gaussian_ratios():
    rng = np.random.default_rng(3)
    ratios = rng.normal(size=(20_000, 4))
    errors, scales = rng.normal(0, 3, (6, 4)), rng.uniform(0.5, 4, (6, 4))
    np.testing.assert_allclose(
        calibrated_crps(errors, scales, ratios), gaussian_crps(errors, scales), rtol=0.05, atol=0.02
    )


def test_summary_by_hand():
    errors = np.array([[0.0, 0, 0, 0], [3, 0, 0, 0], [0, -3, 3, 0], [1, 1, 1, 1]])
    ones = np.ones((4, 4))
    images = np.array([5, 5, 6, 7])
    found = summarize_intervals(errors, ones, ones, images, coverage=0.9)
    # Boxes 1 and 3 have edges outside; image 5 has one box of two, image 6 none, image 7 all.
    assert found["num"] == 4
    assert found["num_images"] == 3
    assert found["num_infinite"] == 0
    assert found["coverage"] == 0.5
    assert found["coverage_edge"] == 13 / 16
    assert found["coverage_by_edge"] == [0.75, 0.75, 0.75, 1]
    assert found["coverage_image"] == pytest.approx(1 / 3)
    assert found["coverage_image_mean"] == 0.5
    assert found["mean_width"] == 2
    # Three edges are 2 outside: 2 + 3 * (2 / .025) * 2 / 16; of an edge alone 2 + 3 * (2 / .1) * 2 / 16.
    assert found["interval_score"] == pytest.approx(32)
    alone = summarize_intervals(errors, ones, ones, images, coverage=0.9, edges_at_once=1)
    assert alone["interval_score"] == pytest.approx(9.5)


def test_infinite_intervals_cover_and_have_no_width():
    errors, images = np.full((3, 4), 2.0), np.arange(3)
    lower, upper = np.ones((3, 4)), np.ones((3, 4))
    upper[1] = lower[1] = np.inf
    found = summarize_intervals(errors, lower, upper, images, coverage=0.9)
    assert found["num_infinite"] == 1
    assert found["coverage"] == pytest.approx(1 / 3)
    assert found["mean_width"] is None
    assert found["interval_score"] is None


def test_nothing_has_no_score():
    nothing = np.zeros((0, 4))
    found = summarize_intervals(nothing, nothing, nothing, np.zeros(0, int), coverage=0.9)
    full = summarize_intervals(nothing + 1, nothing, nothing, np.zeros(0, int), coverage=0.9)
    assert found == full
    assert found.pop("num") == found.pop("num_images") == found.pop("num_infinite") == 0
    assert set(found.values()) == {None}
    ones = np.ones((1, 4))
    some = summarize_intervals(ones, ones, ones, np.zeros(1, int), coverage=0.9)
    assert set(found) < set(some)


def test_groups_are_summarized_apart():
    rng = np.random.default_rng(4)
    errors, half = rng.normal(size=(40, 4)), rng.uniform(0, 2, (40, 4))
    images = rng.integers(0, 9, 40)
    groups = np.array(["cat", "dog"])[rng.integers(0, 2, 40)]
    found = summarize_by_group(groups, errors, half, half, images, coverage=0.8)
    assert list(found) == ["cat", "dog"]
    for name, scores in found.items():
        own = groups == name
        assert scores == summarize_intervals(errors[own], half[own], half[own], images[own], coverage=0.8)


def test_sizes_and_score_bins_have_cocos_and_closed_upper_borders():
    sides = np.array([1.0, 31.9, 32, 95, 96, 500])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    assert coco_sizes(boxes).tolist() == ["small", "small", "medium", "medium", "large", "large"]
    assert score_bins(np.array([0, 0.2, 0.21, 0.9, 1.0])).tolist() == [0, 0, 1, 4, 4]
