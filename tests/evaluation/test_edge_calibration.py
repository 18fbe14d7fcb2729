import dataclasses
import json

import numpy as np
import pytest

from klbox_jax.evaluation.conformal import fit_intervals
from klbox_jax.evaluation.detected_edges import matched_edges
from klbox_jax.evaluation.edge_calibration import EdgeCalibration, fit_edge_calibration
from klbox_jax.evaluation.edge_calibration_scores import evaluate_edge_calibration, summary_line
from klbox_jax.evaluation.interval_scores import interval_score
from klbox_jax.evaluation.score_calibration_error import evaluate_scores
from klbox_jax.evaluation.uncertainty import STD_FLOOR
from tests.evaluation.test_coco import dataset, result, truth
from tests.evaluation.test_results_calibration import drawn_results


@pytest.fixture(scope="module")
def calibration():
    return fit_edge_calibration(*drawn_results(0), data="pond/calibration")


@pytest.mark.parametrize("level", ["box", "class", "image", "image_mean"])
@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.937])
def test_any_coverage_and_level_is_that_of_a_fit_to_the_errors(calibration, level, coverage):
    ground_truth, results = drawn_results(0)
    edges = matched_edges(ground_truth, results, iou_threshold=0.5, min_score=0.0)
    wanted = fit_intervals(
        edges.errors,
        edges.detected.stds,
        edges.image_ids,
        coverage=coverage,
        level=level,
        classes=edges.detected.classes,
    )
    found = calibration.intervals(coverage, level=level)
    stds, classes = np.exp(np.random.default_rng(0).normal(size=(5, 4))), np.array([1, 2, 1, 2, 7])
    half = calibration.half_widths(found, stds, classes)
    np.testing.assert_allclose(half, wanted.half_widths(np.maximum(stds, STD_FLOOR), classes), rtol=1e-12)
    assert (found.num_labels, found.num_images) == (wanted.num_labels, wanted.num_images)


def test_a_least_score_is_a_fit_to_the_results_above_it(calibration):
    ground_truth, results = drawn_results(0)
    above = [entry for entry in results if entry["score"] >= 0.9]
    wanted = fit_edge_calibration(ground_truth, above, data="").intervals(0.9)
    found = calibration.intervals(0.9, min_score=0.9)
    assert 20 < found.num_labels == wanted.num_labels < calibration.intervals(0.9).num_labels
    np.testing.assert_array_equal(found.factors, wanted.factors)
    assert "scores of 0.9 or more" in calibration.promise(found, min_score=0.9)


def test_a_temperature_of_the_stds_cancels(calibration):
    stds, factors = np.array([[1.0, 2, 3, 4], [0.01, 1, 1, 0.01]]), np.array([2.0, 0.5, 1, 3])
    fitted = calibration.intervals(0.9)
    scaled = dataclasses.replace(calibration, temperature=factors)
    half = calibration.half_widths(fitted, stds)
    np.testing.assert_allclose(scaled.half_widths(scaled.intervals(0.9), stds * factors), half)
    np.testing.assert_allclose(half[1], half[0, 0] * np.array([STD_FLOOR, 1, 1, STD_FLOOR]))


def test_results_with_intervals(calibration):
    _, results = drawn_results(1)
    found = calibration.with_intervals(results)
    assert [{key: entry[key] for key in results[0]} for entry in found] == results
    ends = np.array([[e["bbox_interval_90"][side] for side in ("lower", "upper")] for e in found])
    boxes = np.array([entry["bbox"] for entry in results])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(ends.mean(axis=1), boxes, atol=1e-4)
    fitted = calibration.intervals(0.9).half_widths([entry["bbox_std"] for entry in results])
    np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, fitted, atol=1e-4)
    assert all(0 <= entry["score_calibrated"] <= 1 for entry in found)
    json.dumps(found, allow_nan=False)
    assert calibration.with_intervals([]) == []
    assert "90 % of matched boxes" in calibration.file_promise()
    assert (
        "IoU of 0.5 or more; every score of this post-processing; fitted to 180 boxes of 60 images of pond"
        in (calibration.file_promise())
    )


def test_too_few_labels_are_null():
    few = fit_edge_calibration(*drawn_results(2, num_images=2), data="pond")  # 6 boxes, and 9 are needed
    (entry, *_) = few.with_intervals(drawn_results(2, num_images=2)[1])
    assert entry["bbox_interval_90"] == {"lower": [None] * 4, "upper": [None] * 4}
    assert "needs 9 calibration labels and there are 6" in few.file_promise()
    assert np.isfinite(few.intervals(0.8).factors).all()


def test_the_file_gives_the_same(calibration):
    again = EdgeCalibration.from_dict(json.loads(json.dumps(calibration.to_dict(), allow_nan=False)))
    for name in ("ratios", "scores", "classes", "images"):
        np.testing.assert_array_equal(getattr(again, name), getattr(calibration, name))
    _, results = drawn_results(1)
    assert again.with_intervals(results) == calibration.with_intervals(results)


@pytest.mark.parametrize(
    "change", [{"ratios": [-1.0] * 180}, {"scores": [0.5]}, {"classes": [0.5] * 180}, {"iou_threshold": None}]
)
def test_a_damaged_record_is_refused(calibration, change):
    with pytest.raises((TypeError, ValueError)):
        EdgeCalibration.from_dict(calibration.to_dict() | change)


def test_nothing_to_fit():
    ground_truth = dataset([truth([0, 0, 10, 10])])
    far = [result([500.0, 500, 10, 10], 0.9) | {"bbox_std": [1.0] * 4}]
    with pytest.raises(ValueError, match="no detection matches an object of the calibration set"):
        fit_edge_calibration(ground_truth, far, data="pond")


def test_measures_of_other_images(calibration):
    ground_truth, results = drawn_results(1)
    found = evaluate_edge_calibration(ground_truth, results, calibration)
    json.dumps(found, allow_nan=False)
    row = found["intervals"]["0.9"]
    edges = matched_edges(ground_truth, results, iou_threshold=0.5, min_score=0.0)
    half = calibration.intervals(0.9).half_widths(edges.detected.stds)
    inside = np.abs(edges.errors) <= half
    assert row["coverage"] == inside.all(axis=1).mean()
    assert 0.8 < row["coverage"] < 0.97
    scores = interval_score(edges.errors, half, half, coverage=0.975).mean(axis=0)
    for column, edge in enumerate(("x1", "y1", "x2", "y2")):
        assert row["by_edge"][edge] == {
            "coverage": pytest.approx(inside[:, column].mean()),
            "mean_width": pytest.approx(2 * half[:, column].mean()),
            "interval_score": pytest.approx(scores[column]),
        }
    for name, groups in (("by_class", {"cat", "dog"}), ("by_size", {"medium", "large"})):
        assert set(row[name]) == groups
        assert sum(part["num"] for part in row[name].values()) == row["num"] == len(edges.errors)
    assert found["score_calibration"]["before"] == evaluate_scores(ground_truth, results)
    after = found["score_calibration"]["after"]
    assert after["LaECE_0"] < found["score_calibration"]["before"]["LaECE_0"]
    shown = found["score_calibration"]["shown"]
    above = [entry for entry in results if entry["score"] >= 0.5]
    assert shown["before"] == evaluate_scores(ground_truth, above)
    assert shown["after"]["num_detections"] == len(above) < len(results)
    line = summary_line(found)
    assert f"90 %: {100 * row['coverage']:.1f} % of boxes, {row['mean_width']:.1f} px" in line
    assert f"{after['LaECE_0']:.3f} after" in line


def test_measures_of_nothing(calibration):
    ground_truth, _ = drawn_results(1)
    found = evaluate_edge_calibration(ground_truth, [], calibration)
    json.dumps(found, allow_nan=False)
    assert found["intervals"]["0.9"]["by_edge"]["x1"] == dict.fromkeys(
        ("coverage", "mean_width", "interval_score")
    )
    assert summary_line(found) == "intervals: no matched detection"


def test_infinite_intervals_are_said():
    few = fit_edge_calibration(*drawn_results(2, num_images=2), data="pond")
    found = evaluate_edge_calibration(*drawn_results(1), few)
    assert found["intervals"]["0.9"]["mean_width"] is None
    assert found["intervals"]["0.9"]["by_edge"]["x1"]["mean_width"] is None
    assert "90 %: 100.0 % of boxes, infinite" in summary_line(found)
