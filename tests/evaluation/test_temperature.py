import copy
import json
import math

import numpy as np
import pytest

from klbox_jax.evaluation.temperature import (
    METHODS,
    calibrate_detections,
    fit_temperature,
    matched_errors,
    scale_stds,
)
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from tests.evaluation.test_coco import dataset, result, truth
from tests.evaluation.test_uncertainty import drawn_set
from tests.references.temperature import likeliest_factor, smallest_covering_factor


def random_errors(seed, n=60):
    rng = np.random.default_rng(seed)
    stds = np.exp(rng.normal(0, 1, (n, 4)))
    return rng.normal(0, 2, (n, 4)) * stds, stds


def test_factors_by_hand():
    # Distances 1, 2, 3, 4 and 9 of x1: three of five are .6, four are .8 and the first share of .6827 or more.
    distances = np.array([[1.0, 1, 1, 1], [-2, 1, 1, 1], [3, 1, 1, 1], [-4, 1, 1, 1], [9, 1, 1, 1]])
    stds = np.full((5, 4), 2.0)
    np.testing.assert_allclose(fit_temperature(2 * distances, stds, method="coverage"), [4, 1, 1, 1])
    # (1 + 4 + 9 + 16 + 81) / 5 = 22.2
    found = fit_temperature(2 * distances, stds, method="likelihood")
    np.testing.assert_allclose(found, [math.sqrt(22.2), 1, 1, 1])


@pytest.mark.parametrize("seed", range(4))
def test_factors_agree_with_a_search(seed):
    errors, stds = random_errors(seed)
    coverage = fit_temperature(errors, stds, method="coverage")
    likelihood = fit_temperature(errors, stds, method="likelihood")
    for edge in range(4):
        column = (errors[:, edge].tolist(), stds[:, edge].tolist())
        assert coverage[edge] == smallest_covering_factor(*column, share=0.682689492137)
        assert likelihood[edge] == pytest.approx(likeliest_factor(*column), rel=1e-6)


def test_outliers_move_only_the_likelihood():
    errors, stds = random_errors(5, n=1000)
    spoilt = errors.copy()
    spoilt[:10] *= 100
    for method, moves in (("coverage", False), ("likelihood", True)):
        ratios = fit_temperature(spoilt, stds, method=method) / fit_temperature(errors, stds, method=method)
        assert (ratios > 2).all() == moves
        assert (ratios < 1.1).all() != moves


@pytest.mark.parametrize("method", METHODS)
def test_the_factors_of_scaled_stds_are_one(method):
    errors, stds = random_errors(6)
    factors = fit_temperature(errors, stds, method=method)
    np.testing.assert_allclose(fit_temperature(errors, factors * stds, method=method), 1)
    np.testing.assert_allclose(fit_temperature(errors, 10 * stds, method=method), factors / 10)


def test_what_cannot_be_fitted_is_refused():
    errors, stds = random_errors(7)
    with pytest.raises(ValueError, match="'loud' is unknown; choose coverage or likelihood"):
        fit_temperature(errors, stds, method="loud")
    with pytest.raises(ValueError, match="no detection matches an object of the calibration set"):
        fit_temperature(errors[:0], stds[:0], method="coverage")
    for method in METHODS:
        with pytest.raises(ValueError, match=r"because most errors of the \d+ matched detections are 0"):
            fit_temperature(0 * errors, stds, method=method)


def test_errors_are_those_of_true_positives_against_the_label():
    annotation = truth([10, 10, 20, 20], bbox_noisy=[9, 10, 22, 20], bbox_std=[0.5, 0.5, 2, 0.5])
    found = {**result([11, 10, 19, 20], 0.9), "bbox_std": [1.0, 1, 2, 0.01]}
    duplicate = {**result([11, 10, 18, 20], 0.8), "bbox_std": [1.0, 1, 1, 1]}
    errors, stds = matched_errors(dataset([annotation]), [found, duplicate])
    np.testing.assert_allclose(errors, [[2, 0, -1, 0]])
    np.testing.assert_allclose(stds, [[1, 1, 2, 0.1]])  # the floor
    assert matched_errors(dataset([annotation]), [result([11, 10, 19, 20], 0.9)])[0].shape == (0, 4)


def test_scaling_leaves_the_rest_alone():
    results = [{**result([0, 0, 9, 9], 0.5), "bbox_std": [1.0, 2.0, 3.0, 4.0]}, result([0, 0, 5, 5], 0.4)]
    before = copy.deepcopy(results)
    scaled = scale_stds(results, np.array([2.0, 1.0, 0.5, 10.0]))
    assert results == before
    assert scaled[0] == results[0] | {"bbox_std": [2.0, 2.0, 1.5, 40.0]}
    assert scaled[1] == results[1]


@pytest.mark.parametrize("method", METHODS)
def test_calibration_brings_coverage_to_other_images(method):
    # Stds twice too small on both sets, in whose place a factor of 2 belongs.
    fitted = calibrate_detections(*drawn_set(0, std_scale=0.5), method=method)
    np.testing.assert_allclose(fitted["temperature"], 2, rtol=0.1)
    assert fitted["temperature"] == fitted["factors"][method]
    assert set(fitted["factors"]) == set(METHODS)
    assert fitted["num_matched"] == 900
    assert fitted["before"]["coverage_1sigma"] < 0.45
    assert fitted["after"]["NLL"] < fitted["before"]["NLL"]
    ground_truth, results = drawn_set(1, std_scale=0.5)
    raw = evaluate_uncertainty(ground_truth, results)
    scores = evaluate_uncertainty(ground_truth, scale_stds(results, np.array(fitted["temperature"])))
    # Fitted and measured on 3600 edges each: four standard deviations of the difference.
    tolerance = 4 * math.sqrt(2 * 0.683 * 0.317 / 3600)
    assert scores["coverage_1sigma"] == pytest.approx(0.6827, abs=tolerance)
    assert abs(raw["coverage_1sigma"] - 0.6827) > tolerance
    assert scores["NLL"] < raw["NLL"] - 0.5
    assert scores["ENCE"] < 0.2 < raw["ENCE"]
    assert scores["RMSE"] == raw["RMSE"]
    assert json.loads(json.dumps(fitted, allow_nan=False)) == fitted


def test_each_edge_has_its_own_factor():
    ground_truth, results = drawn_set(2)
    wrong = scale_stds(results, np.array([1.0, 0.5, 2.0, 0.1]))
    fitted = calibrate_detections(ground_truth, wrong, method="likelihood")
    np.testing.assert_allclose(fitted["temperature"], [1, 2, 0.5, 10], rtol=0.1)
