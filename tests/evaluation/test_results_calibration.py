import copy
import json

import numpy as np
import pytest

from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.detected_edges import matched_edges
from klbox_jax.evaluation.interval_scores import summarize_intervals
from klbox_jax.evaluation.results_calibration import (
    CalibrationSettings,
    ResultsCalibration,
    fit_results,
)
from klbox_jax.evaluation.uncertainty import STD_FLOOR
from tests.evaluation.test_coco import dataset, result, truth


def drawn_results(seed, *, num_images=60, with_stds=True):
    """Objects of two classes with labels whose noise `bbox_std` knows; a false positive in each image."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(num_images):
        for k in range(3):
            x, y, width, height = 300 * k, 20.0, *rng.uniform(40, 200, 2)
            stds = np.exp(rng.normal(0.5, 0.8, 4))
            edges = np.array([x, y, x + width, y + height]) + stds * rng.standard_t(4, 4)
            category = int(rng.integers(1, 3))
            annotations.append(truth([x, y, width, height], image=10 * image, category=category))
            box = [*edges[:2], *(edges[2:] - edges[:2])]
            score = float(np.clip(1.1 - stds.mean() / 10 + rng.normal(0, 0.05), 0.4, 1))
            entry = result([float(v) for v in box], score, image=10 * image, category=category)
            results.append(entry | ({"bbox_std": stds.tolist()} if with_stds else {}))
        false = result([900.0, 900, 50, 50], float(rng.uniform(0.2, 0.7)), image=10 * image)
        results.append(false | ({"bbox_std": [1.0] * 4} if with_stds else {}))
    classes = ((1, "cat"), (2, "dog"))
    return dataset(annotations, num_images=num_images, classes=classes), results


def covered(ground_truth, applied, coverage):
    """Share of matched boxes whose label is inside, from the entries as written."""
    raw = [entry | {"score": entry.get("score_uncalibrated", entry["score"])} for entry in applied]
    edges = matched_edges(ground_truth, raw, iou_threshold=0.5, min_score=0.0)
    by_box = {tuple(entry["bbox"]): entry["edge_intervals"][coverage] for entry in raw}
    inside = []
    for box, error in zip(edges.detected.boxes, edges.errors, strict=True):
        label = box + error
        key = min(by_box, key=lambda k: abs(k[0] - box[0]) + abs(k[1] - box[1]))
        ends = by_box[key]
        inside.append((ends["lower"] <= label + 1e-3).all() and (label - 1e-3 <= ends["upper"]).all())
    return np.mean(inside)


@pytest.mark.parametrize("with_stds", [True, False])
def test_intervals_of_other_images_cover_and_scores_are_calibrated(with_stds):
    calibration = fit_results(*drawn_results(0, with_stds=with_stds), CalibrationSettings())
    assert calibration.settings.widths == ("scaled" if with_stds else "width_model")
    assert (calibration.width_model is None) == with_stds
    ground_truth, results = drawn_results(1, with_stds=with_stds)
    before = copy.deepcopy(results)
    applied = calibration.apply(results)
    assert results == before
    for coverage in ("0.5", "0.8", "0.9", "0.95"):
        # 180 boxes to fit and 180 to test on: two standard deviations of sqrt(c (1 - c) / 90).
        share = float(coverage)
        assert covered(ground_truth, applied, coverage) == pytest.approx(
            share, abs=2.5 * np.sqrt(share * (1 - share) / 90)
        )
    assert [entry["score_uncalibrated"] for entry in applied] == [entry["score"] for entry in before]
    assert evaluate_detections(ground_truth, applied)["AP"] == evaluate_detections(ground_truth, before)["AP"]
    json.dumps(applied, allow_nan=False)


def test_the_check_compares_the_widths_on_images_left_out():
    ground_truth, results = drawn_results(2)
    calibration = fit_results(ground_truth, results, CalibrationSettings(coverages=(0.9,)))
    by_kind = calibration.check["intervals"]
    assert list(by_kind) == ["scaled", "additive", "multiplicative", "width_model"]
    scores = {name: found["0.9"]["interval_score"] for name, found in by_kind.items()}
    assert scores["scaled"] < 0.9 * min(scores["additive"], scores["multiplicative"])
    assert len({found["0.9"]["num"] for found in by_kind.values()}) == 1
    assert calibration.check["LaECE_0"]["after"] < calibration.check["LaECE_0"]["before"]
    text = "\n".join(calibration.lines())
    assert "at least 90 % of matched boxes" in text
    assert "scaled, 0.9 asked: " in text
    assert "LaECE_0 " in text
    few = dataset(ground_truth["annotations"][:9], num_images=3, classes=((1, "cat"), (2, "dog")))
    small = fit_results(few, results[:12], CalibrationSettings(coverages=(0.5,)))
    assert small.check is None
    assert len(small.lines()) == 1


def test_a_calibration_survives_json():
    for choices in (
        {"widths": "width_model", "level": "class", "asymmetric": True},
        {"scores": "none", "multiplicity": "edge", "level": "image", "missed_share": 0.1},
    ):
        ground_truth, results = drawn_results(3)
        calibration = fit_results(ground_truth, results, CalibrationSettings(**choices))
        text = json.dumps(calibration.to_dict(), allow_nan=False)
        again = ResultsCalibration.from_dict(json.loads(text))
        assert again.apply(results) == calibration.apply(results)
        assert again.settings == calibration.settings
        assert ("score_uncalibrated" in again.apply(results)[0]) == (choices.get("scores") != "none")


def test_intervals_in_entries_are_those_of_the_arrays():
    ground_truth, results = drawn_results(4)
    settings = CalibrationSettings(coverages=(0.9,), asymmetric=True, widths="scaled")
    calibration = fit_results(ground_truth, results, settings)
    entry = results[5]
    found = calibration.apply([entry])[0]["edge_intervals"]["0.9"]
    x, y, width, height = entry["bbox"]
    stds = np.maximum(entry["bbox_std"], STD_FLOOR)
    lower, upper = calibration.intervals[0.9].half_widths([stds], [entry["category_id"]])
    np.testing.assert_allclose(found["lower"], [x, y, x + width, y + height] - lower[0], atol=1e-4)
    np.testing.assert_allclose(found["upper"], [x, y, x + width, y + height] + upper[0], atol=1e-4)
    assert calibration.apply([]) == []


def test_low_scores_are_outside_the_calibration():
    ground_truth, results = drawn_results(5)
    calibration = fit_results(ground_truth, results, CalibrationSettings(min_score=0.6))
    applied = calibration.apply(results)
    for entry in applied:
        assert (entry["edge_intervals"] is None) == (entry["score_uncalibrated"] < 0.6)
    shown = [entry for entry in results if entry["score"] >= 0.6]
    assert calibration.scores.num_detections == len(shown) < len(results)


def test_too_few_labels_are_null_and_said():
    ground_truth, results = drawn_results(6, num_images=4)
    calibration = fit_results(ground_truth, results, CalibrationSettings(coverages=(0.5, 0.99)))
    applied = calibration.apply(results[:1])[0]["edge_intervals"]
    assert applied["0.99"] == {"lower": [None] * 4, "upper": [None] * 4}
    assert None not in applied["0.5"]["lower"]
    assert any("needs 99 calibration labels and there are " in line for line in calibration.lines())
    with pytest.raises(ValueError, match="needs 9 calibration images and there are 4, so the intervals"):
        fit_results(ground_truth, results, CalibrationSettings(coverages=(0.95, 0.9), level="image"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coverages": (1.0,)}, "coverage = 1.0 must be above 0 and below 1"),
        ({"coverages": ()}, "coverages is empty"),
        (
            {"widths": "log"},
            "widths = 'log' is unknown; choose auto, scaled, additive, multiplicative or width",
        ),
        ({"scores": "beta"}, "scores = 'beta' is unknown"),
        ({"widths": "scaled"}, "needs results with bbox_std; choose width_model or auto"),
        ({"iou_threshold": 1.0}, "no matched detection"),
        ({"min_score": 2.0}, "no matched detection"),
    ],
)
def test_settings_that_do_not_fit_end_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        fit_results(*drawn_results(7, with_stds=False, num_images=5), CalibrationSettings(**settings))
    assert "\n" not in str(error.value)


def test_one_image_cannot_have_a_width_model():
    ground_truth, results = drawn_results(8, with_stds=False, num_images=1)
    with pytest.raises(ValueError, match="there is one image; give two or more"):
        fit_results(ground_truth, results, CalibrationSettings())
    plain = fit_results(ground_truth, results, CalibrationSettings(widths="additive", coverages=(0.5,)))
    assert plain.check is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, r"results\[1\]: score must be a finite number, not nan"),
        ({"bbox": [1, 2, 3]}, r"results\[1\]: bbox must be four finite numbers"),
        ({"image_id": None}, r"results\[1\]: image_id must be a number or a text, not None"),
        ({"category_id": [1]}, r"results\[1\]: category_id must be a number or a text"),
        ({"bbox_std": [1, 1, 1, -1]}, r"results\[1\]: bbox_std .* has a negative number"),
        ({"score": 7.0}, r"scores\[1\] = 7.0 must be from 0 to 1"),
    ],
)
def test_entries_at_fault_are_named(change, message):
    ground_truth, results = drawn_results(9)
    calibration = fit_results(ground_truth, results, CalibrationSettings())
    with pytest.raises(ValueError, match=message):
        calibration.apply([results[0], results[1] | change])


def test_results_without_stds_are_refused_by_a_calibration_that_needs_them():
    calibration = fit_results(*drawn_results(10), CalibrationSettings())
    _, plain = drawn_results(11, with_stds=False)
    with pytest.raises(ValueError, match="have no bbox_std, and the intervals were fitted with it"):
        calibration.apply(plain)


def test_texts_as_ids():
    ground_truth, results = drawn_results(12, num_images=20)
    settings = CalibrationSettings(level="class", coverages=(0.8,))
    expected = fit_results(ground_truth, results, settings).apply(results)

    def renamed(entries):
        return [
            entry
            | {"image_id": f"image {entry['image_id']:03d}", "category_id": "ab"[entry["category_id"] - 1]}
            for entry in entries
        ]

    texts = {
        "images": [{"id": f"image {image['id']:03d}"} for image in ground_truth["images"]],
        "categories": [{"id": "a", "name": "cat"}, {"id": "b", "name": "dog"}],
        "annotations": renamed(ground_truth["annotations"]),
    }
    found = fit_results(texts, renamed(results), settings).apply(renamed(results))
    assert [entry["edge_intervals"] for entry in found] == [entry["edge_intervals"] for entry in expected]
    assert [entry["score"] for entry in found] == [entry["score"] for entry in expected]


def test_matched_edges_are_of_the_label():
    ground_truth = dataset([truth([10, 10, 20, 20], bbox_noisy=[9, 10, 22, 20])])
    entry = result([10, 11, 20, 20], 0.9) | {"bbox_std": [0.0, 1, 2, 3]}
    edges = matched_edges(ground_truth, [entry], iou_threshold=0.5, min_score=0.0)
    np.testing.assert_array_equal(edges.errors, [[-1, -1, 1, -1]])
    np.testing.assert_array_equal(edges.detected.stds, [[STD_FLOOR, 1, 2, 3]])
    found = summarize_intervals(
        edges.errors, *2 * (edges.own_scales("additive"),), edges.image_ids, coverage=0.9
    )
    assert found["coverage"] == 1
