import json
import math

import numpy as np
import pytest

from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.score_calibration import (
    METHODS,
    MIN_DETECTIONS,
    Quality,
    ScoreCalibration,
    fit_quality,
    fit_scores,
    isotonic_knots,
)
from klbox_jax.evaluation.score_calibration_error import laece_0, matched_scores
from tests.evaluation.test_coco import random_set
from tests.references import score_calibration as reference


def overconfident(seed, n=4000, *, classes=(3, 9)):
    """Scores that are too high, more so in the second class; ties at one decimal in a third of the rows."""
    rng = np.random.default_rng(seed)
    names = np.array(classes)[rng.integers(0, len(classes), n)]
    scores = rng.beta(1.0, 1.5, n)
    scores[::3] = np.round(scores[::3], 1)
    expected = np.where(names == classes[0], scores**2, 0.5 * scores)
    ious = np.where(rng.random(n) < expected / 0.8, rng.uniform(0.6, 1.0, n), 0.0)
    return scores, ious, names


@pytest.mark.parametrize("method", METHODS)
def test_calibration_error_falls_and_order_stays(method):
    fitted = fit_scores(*overconfident(0), method=method)
    scores, ious, classes = overconfident(1)
    calibrated = fitted.calibrate(scores, classes)
    # Scores that are too high everywhere are no matter of a temperature, which keeps 0.5 at 0.5.
    ratio = laece_0(calibrated, ious, classes) / laece_0(scores, ious, classes)
    assert (0.9 < ratio < 1.1) if method == "temperature" else ratio < 0.5
    assert ((calibrated >= 0) & (calibrated <= 1)).all()
    for name in (3, 9):
        own = classes == name
        order = np.argsort(scores[own])
        rises = np.diff(calibrated[own][order])
        np.testing.assert_array_equal(rises > 0, np.diff(scores[own][order]) > 0)


@pytest.mark.parametrize("seed", range(3))
def test_isotonic_agrees_with_merged_blocks(seed):
    rng = np.random.default_rng(seed)
    x = np.round(rng.uniform(0, 1, 70), 2)
    y = np.clip(x + rng.normal(0, 0.4, 70), 0, 1)
    expected = reference.isotonic(x.tolist(), y.tolist())
    places = np.array(sorted(expected))
    np.testing.assert_allclose(
        np.interp(places, *isotonic_knots(x, y)), [expected[place] for place in places.tolist()]
    )
    falling = isotonic_knots(-x, y, increasing=False)
    np.testing.assert_allclose(np.interp(-places, *falling), [expected[place] for place in places.tolist()])


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_logistic_fits_agree_with_a_search(method):
    scores, ious, _ = overconfident(2, n=300)
    scores = np.clip(scores, 0.02, 0.98)
    fitted = fit_scores(scores, ious, np.zeros(300, int), method=method)

    def loss(pair, logits, targets):
        z = pair[0] * logits + pair[1]
        return np.mean(np.log1p(np.exp(z)) - targets * z)

    logits = np.log(scores / (1 - scores))
    expected = reference.smallest_cross_entropy(logits, ious, loss=loss, has_intercept=method == "platt")
    np.testing.assert_allclose(fitted.curve[:, 0], expected, atol=2e-3)
    assert method == "platt" or fitted.curve[1, 0] == 0
    single = fitted.calibrate([0.7], [0])[0]
    expected_score = 1 / (1 + math.exp(-fitted.curve[0, 0] * math.log(0.7 / 0.3) - fitted.curve[1, 0]))
    assert single == pytest.approx(expected_score, abs=1e-4)


def test_a_temperature_is_found_again():
    rng = np.random.default_rng(7)
    true = rng.uniform(0, 1, 20_000)
    ious = (rng.random(20_000) < true).astype(float)
    scores = true**2 / (true**2 + (1 - true) ** 2)  # twice the logit
    fitted = fit_scores(scores, ious, np.zeros(20_000, int), method="temperature")
    assert fitted.curve[0, 0] == pytest.approx(0.5, abs=0.02)


def test_linear_is_least_squares_and_never_falls():
    scores, ious, classes = overconfident(3, n=500, classes=(1, 2))
    slope, intercept = np.polyfit(scores, ious, 1)
    fitted = fit_scores(scores, ious, classes, method="linear")
    np.testing.assert_allclose(fitted.curve[:, 0], [slope, intercept])
    falling = fit_scores(scores, 1 - ious, classes, method="linear")
    assert falling.curve[0, 0] == 0
    assert falling.curve[1, 0] == pytest.approx(1 - ious.mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_small_class_uses_the_curve_of_all(method):
    scores, ious, classes = overconfident(4)
    classes = np.where(np.arange(len(classes)) < MIN_DETECTIONS - 1, 77, classes)
    without_matches = np.arange(1000, 1200)
    classes[without_matches], ious[without_matches] = 55, 0.0
    fitted = fit_scores(scores, ious, classes, method=method)
    assert fitted.pooled_classes == (55, 77)
    assert sorted(fitted.class_curves) == [3, 9]
    some = np.linspace(0, 1, 11)
    unknown = fitted.calibrate(some, np.full(11, 1234))
    np.testing.assert_array_equal(fitted.calibrate(some, np.full(11, 77)), unknown)
    alone = fit_scores(scores[classes == 9], ious[classes == 9], classes[classes == 9], method=method)
    np.testing.assert_allclose(fitted.calibrate(some, np.full(11, 9)), alone.calibrate(some, np.full(11, 9)))
    text = json.dumps(fitted.to_dict(), allow_nan=False)
    again = ScoreCalibration.from_dict(json.loads(text))
    np.testing.assert_array_equal(again.calibrate(scores, classes), fitted.calibrate(scores, classes))
    assert again.to_dict() == fitted.to_dict()


@pytest.mark.parametrize("method", METHODS)
def test_average_precision_does_not_move(method):
    ground_truth, results = random_set(1)
    scores, ious, classes = matched_scores(ground_truth, results)
    fitted = fit_scores(scores, ious, classes, method=method)
    found = fitted.calibrate(
        [entry["score"] for entry in results], [entry["category_id"] for entry in results]
    )
    changed = [entry | {"score": float(score)} for entry, score in zip(results, found, strict=True)]
    before, after = evaluate_detections(ground_truth, results), evaluate_detections(ground_truth, changed)
    assert after["AP"] == before["AP"]
    assert [entry["score"] for entry in changed] != [entry["score"] for entry in results]


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_are_one_bin_and_no_error(method):
    ious = np.tile([0.0, 0.8], 40)
    fitted = fit_scores(np.full(80, 0.9), ious, np.zeros(80, int), method=method)
    assert fitted.calibrate([0.9], [0])[0] == pytest.approx(0.5 if method == "temperature" else 0.4, abs=1e-3)
    edges = fit_scores([0.0, 1.0], [0.0, 1.0], [1, 1], method=method)
    assert np.isfinite(edges.calibrate([0.0, 0.5, 1.0], [1, 1, 1])).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "beta"}, "method = 'beta' is unknown; choose isotonic, platt, linear or temperature"),
        ({"scores": [0.1, 1.2]}, r"scores\[1\] = 1.2 must be from 0 to 1; give probabilities, not logits"),
        ({"scores": [np.nan, 0.2]}, r"scores\[0\] = nan is not finite"),
        ({"ious": [0.5, -0.1]}, r"ious\[1\] = -0.1 must be from 0 to 1"),
        ({"ious": [0.5]}, r"ious has shape \(1,\); give \[2\]"),
        ({"classes": [1]}, r"classes has shape \(1,\); give \[2\]"),
        ({"ious": [0.0, 0.0]}, "none of the 2 detections matches an object"),
        ({"scores": [], "ious": [], "classes": []}, "none of the 0 detections matches an object"),
    ],
)
def test_bad_input_ends_in_one_line(changes, message):
    arguments = {"scores": [0.5, 0.6], "ious": [0.0, 0.9], "classes": [1, 1], "method": "platt"} | changes
    with pytest.raises(ValueError, match=message) as error:
        fit_scores(arguments["scores"], arguments["ious"], arguments["classes"], method=arguments["method"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threshold", [0.75, None])
def test_quality_falls_with_sigma_and_agrees_with_merged_blocks(threshold):
    rng = np.random.default_rng(5)
    relative_stds = np.round(np.exp(rng.normal(-3, 0.7, 400)), 3)
    ious = np.clip(1 - 6 * relative_stds * rng.uniform(0, 1.5, 400), 0, 1)
    fitted = fit_quality(relative_stds, ious, iou_threshold=threshold)
    targets = ious if threshold is None else ious > threshold
    expected = reference.isotonic((-relative_stds).tolist(), targets.astype(float).tolist())
    places = np.unique(relative_stds)
    found = fitted.factors(places)
    np.testing.assert_allclose(found, [expected[-place] for place in places.tolist()], atol=2e-4)
    assert (np.diff(found) < 0).all()
    assert (found > 0).all()
    assert (fitted.factors([0.0, 100.0]) <= 1).all()
    again = Quality.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again.factors(places), found)
    for arguments, message in (
        (([], []), "no matched detection"),
        (([-0.1], [0.5]), "a std is 0 or more"),
        (([0.1], [1.5]), r"ious\[0\] = 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_quality(*arguments, iou_threshold=0.5)
    with pytest.raises(ValueError, match=r"iou_threshold = 1.0 must be from 0 to below 1"):
        fit_quality([0.1], [0.5], iou_threshold=1.0)
