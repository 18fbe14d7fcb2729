import copy
import json
import math

import numpy as np
import pytest

from klbox_jax.evaluation.uncertainty import against_true_stds, evaluate_uncertainty
from tests.evaluation.test_coco import dataset, result, truth
from tests.references.uncertainty import partition, spearman

EDGE_SCORES = ("NLL", "entropy", "coverage_1sigma", "spearman_sigma_error", "sharpness", "ENCE", "AUSE")


def as_bbox(corners):
    x1, y1, x2, y2 = (float(edge) for edge in corners)
    return [x1, y1, x2 - x1, y2 - y1]


def drawn_set(seed, *, num_images=300, std_scale=1.0, with_noise=True):
    """Large objects; labels with noise of known stds, predictions with errors of their own.

    The predicted stds are the right ones for the distance of prediction and label, times `std_scale`.
    """
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(num_images):
        for k in range(3):
            box = np.array([0, 300 * k, 0, 300 * k]) + np.array([20, 20, 220, 180]) + rng.uniform(-9, 9, 4)
            label_stds, own_stds = np.exp(rng.normal(0, 0.7, 4)), np.exp(rng.normal(0, 0.7, 4))
            label, predicted = rng.normal(box, label_stds), rng.normal(box, own_stds)
            extra = {"bbox_noisy": as_bbox(label), "bbox_std": label_stds.tolist()} if with_noise else {}
            annotations.append(truth(as_bbox(box), image=10 * image, **extra))
            stds = np.hypot(own_stds, label_stds) if with_noise else own_stds
            entry = result(as_bbox(predicted), float(rng.uniform()), image=10 * image)
            results.append({**entry, "bbox_std": (std_scale * stds).tolist()})
    return dataset(annotations, num_images=num_images), results


def test_calibrated_detections_score_as_they_should():
    ground_truth, results = drawn_set(0)
    scores = evaluate_uncertainty(ground_truth, results)
    n = 4 * len(results)
    assert scores["num_matched"] == scores["num_objects"] == len(results) == 900
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        tolerance = 4 * math.sqrt(share * (1 - share) / n)
        assert scores[f"coverage_{sigmas}sigma"] == pytest.approx(share, abs=tolerance)
    # NLL is the entropy up to a mean of (z^2 - 1) / 2.
    stds = np.array([entry["bbox_std"] for entry in results])
    entropy = np.mean(np.log(stds * math.sqrt(2 * math.pi * math.e)))
    assert scores["entropy"] == pytest.approx(entropy)
    assert scores["NLL"] == pytest.approx(entropy, abs=4 / math.sqrt(2 * n))
    assert scores["ENCE"] < 3 / math.sqrt(math.pi * n / 10)
    assert scores["calibration"]["ECE"] < 0.02
    assert scores["sharpness"] == pytest.approx(stds.mean())
    assert 0.2 < scores["spearman_sigma_error"] < 0.7
    assert 0 < scores["AUSE"] < 0.5


def test_overconfidence_shows():
    right = evaluate_uncertainty(*drawn_set(0))
    small = evaluate_uncertainty(*drawn_set(0, std_scale=0.5))
    assert small["coverage_1sigma"] == pytest.approx(0.383, abs=0.04)  # within half a std
    assert small["NLL"] > right["NLL"] + 0.5
    assert small["energy_score"] > right["energy_score"]
    assert small["ENCE"] == pytest.approx(1, abs=0.1)
    assert small["calibration"]["ECE"] > 0.05
    for same in ("RMSE", "spearman_sigma_error", "AUSE", "num_matched"):
        assert small[same] == pytest.approx(right[same])


def test_errors_are_against_the_exact_box_and_the_label():
    scores = evaluate_uncertainty(*drawn_set(1))
    # E exp(2 N(0, .7^2)) = exp(.98), for the prediction and for the label.
    assert scores["RMSE"] == pytest.approx(math.exp(0.49), rel=0.1)
    assert scores["RMSE_label"] == pytest.approx(math.sqrt(2) * math.exp(0.49), rel=0.1)
    photographs = evaluate_uncertainty(*drawn_set(1, with_noise=False))
    assert photographs["RMSE"] == photographs["RMSE_label"]
    assert photographs["true_std"] is None
    assert photographs["coverage_1sigma"] == pytest.approx(0.683, abs=0.04)


def test_scores_by_hand():
    # Errors against the label 2, 0, -1, 0 with stds 1, 1, 2, 1; against the exact box 1, 0, 0, 0.
    annotation = truth([10, 10, 20, 20], bbox_noisy=[9, 10, 22, 20], bbox_std=[0.5, 0.5, 2, 0.5])
    found = {**result([11, 10, 19, 20], 0.9), "bbox_std": [1, 1, 2, 1]}
    scores = evaluate_uncertainty(dataset([annotation]), [found])
    assert scores["RMSE"] == pytest.approx(0.5)
    assert scores["RMSE_label"] == pytest.approx(math.sqrt(5 / 4))
    # Four times log(2 pi) / 2, log 2 of the third edge, (4 + 1/4) / 2 of the errors.
    assert scores["NLL"] == pytest.approx(0.5 * math.log(2 * math.pi) + (math.log(2) + 4.25 / 2) / 4)
    assert scores["coverage_1sigma"] == 0.75
    assert scores["coverage_2sigma"] == 1
    assert scores["sharpness"] == 1.25
    assert scores["by_edge"]["x1"]["RMSE"] == 1
    assert scores["by_edge"]["x1"]["RMSE_label"] == 2
    assert scores["by_edge"]["x2"]["NLL"] == pytest.approx(0.5 * math.log(8 * math.pi) + 1 / 8)
    # Errors 2, 0, 1, 0 have ranks 4, 1.5, 3, 1.5; stds 2, 2, 4, 2: covariance 1, squares 4.5 and 3.
    assert scores["spearman_sigma_error"] == pytest.approx(1 / math.sqrt(4.5 * 3))
    assert scores["true_std"]["worst_edge"] == 1
    assert scores["true_std"]["num_worst_edge"] == 1
    assert scores["true_std"]["median_ratio"] == 2


def test_every_part_of_the_partition_is_scored():
    stds = {"bbox_std": [1.0, 2.0, 3.0, 4.0]}
    ground_truth = dataset([truth([0, 0, 100, 100]), truth([300, 0, 100, 100], iscrowd=1)])
    results = [
        {**result([0, 0, 100, 100], 0.9), **stds},
        {**result([10, 0, 100, 100], 0.8), **stds},
        {**result([50, 0, 100, 100], 0.7), **stds},
        {**result([600, 0, 100, 100], 0.6), **stds},
        {**result([310, 10, 50, 50], 0.5), **stds},
    ]
    names = [name for name, _ in partition(ground_truth, results, iou_threshold=0.5).values()]
    assert names == ["true positive", "duplicate", "localization error", "false positive", "ignored"]
    scores = evaluate_uncertainty(ground_truth, results)
    counts = (scores["num_matched"], scores["num_objects"], scores["num_missed"], scores["num_ignored"])
    assert counts == (1, 1, 0, 1)
    assert scores["RMSE"] == 0
    assert scores["duplicates"]["RMSE"] == pytest.approx(math.sqrt(50))
    assert scores["localization_errors"]["RMSE"] == pytest.approx(math.sqrt(1250))
    # Mean of log(s sqrt(2 pi e)) over 1, 2, 3, 4.
    entropy = math.log(math.sqrt(2 * math.pi * math.e)) + math.log(24) / 4
    for part in ("duplicates", "localization_errors", "false_positives"):
        assert scores[part]["entropy"] == pytest.approx(entropy)
        assert scores[part]["sharpness"] == 2.5
    assert scores["false_positives"]["num"] == 1
    # Two draws are N(0, 2 s^2) apart: the mean square is 60, the mean a little below its root.
    assert 0.85 * math.sqrt(60) < scores["false_positives"]["spread"] < math.sqrt(60)
    assert evaluate_uncertainty(ground_truth, results, min_score=0.65)["false_positives"]["num"] == 0


def test_a_std_of_zero_counts_as_the_floor():
    ground_truth = dataset([truth([0, 0, 100, 100])])
    found = {**result([0.1, 0, 99.9, 100], 0.9), "bbox_std": [0, 0, 0, 0]}
    scores = evaluate_uncertainty(ground_truth, [found])
    # 0.1 pixels: one error of one std.
    assert scores["NLL"] == pytest.approx(0.5 * math.log(2 * math.pi * 0.01) + 1 / 8)
    assert scores["sharpness"] == pytest.approx(0.1)


def test_results_without_stds_are_counted_and_measured():
    ground_truth, results = drawn_set(2, num_images=20)
    full = evaluate_uncertainty(ground_truth, results)
    bare = [{key: value for key, value in entry.items() if key != "bbox_std"} for entry in results]
    scores = evaluate_uncertainty(ground_truth, bare)
    assert keys_of(scores, skip=("calibration", "true_std")) == keys_of(
        full, skip=("calibration", "true_std")
    )
    for name in ("num_matched", "RMSE", "RMSE_label", "num_objects"):
        assert scores[name] == full[name]
    for name in (*EDGE_SCORES, "energy_score", "calibration", "true_std"):
        assert scores[name] is None
    assert scores["false_positives"] == {"num": 0, "sharpness": None, "entropy": None, "spread": None}


def keys_of(scores, skip):
    return {
        key: keys_of(value, skip) if isinstance(value, dict) else None
        for key, value in scores.items()
        if key not in skip
    }


@pytest.mark.parametrize("empty", ["results", "annotations", "both"])
def test_nothing_to_score(empty):
    ground_truth, results = drawn_set(3, num_images=4)
    if empty != "annotations":
        results = []
    if empty != "results":
        ground_truth["annotations"] = []
    scores = evaluate_uncertainty(ground_truth, results)
    assert scores["num_matched"] == 0
    assert scores["num_missed"] == len(ground_truth["annotations"])
    for name in ("RMSE", "RMSE_label", "energy_score", "true_std", *EDGE_SCORES):
        assert scores[name] is None
    assert scores["false_positives"]["num"] == len(results)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_scores_are_plain_json_and_arguments_are_left_alone():
    ground_truth, results = drawn_set(4, num_images=10)
    before = copy.deepcopy((ground_truth, results))
    scores = evaluate_uncertainty(ground_truth, results)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert (ground_truth, results) == before


def test_against_true_stds():
    rng = np.random.default_rng(5)
    boxes = np.concatenate([rng.uniform(0, 50, (40, 2)), rng.uniform(60, 200, (40, 2))], axis=1)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    sides = np.stack([width, height, width, height], axis=1)
    stds, true_stds = np.exp(rng.normal(0, 1, (40, 4))), 0.1 * sides * rng.uniform(0.5, 1, (40, 4))
    found = against_true_stds(stds, true_stds, boxes)
    flat = [array.ravel().tolist() for array in (stds, true_stds, sides)]
    shares = [
        [a / b for a, b in zip(values, flat[2], strict=True)] for values in (flat[0], flat[1], [1] * 160)
    ]
    assert found["spearman"] == pytest.approx(spearman(flat[0], flat[1]))
    assert found["spearman_of_size"] == pytest.approx(spearman(flat[2], flat[1]))
    assert found["spearman_relative"] == pytest.approx(spearman(shares[0], shares[1]))
    assert found["spearman_relative_of_size"] == pytest.approx(spearman(shares[2], shares[1]))
    # The true stds themselves.
    oracle = against_true_stds(true_stds, true_stds, boxes)
    assert oracle["spearman"] == oracle["spearman_relative"] == oracle["median_ratio"] == 1
    assert against_true_stds(stds, 0 * true_stds, boxes)["median_ratio"] is None


def test_true_stds_are_used_where_they_are_known():
    ground_truth, results = drawn_set(6, num_images=30)
    known = evaluate_uncertainty(ground_truth, results)["true_std"]
    for entry in ground_truth["annotations"][::2]:
        del entry["bbox_std"]
    half = evaluate_uncertainty(ground_truth, results)["true_std"]
    assert 0 < half["num_worst_edge"] < known["num_worst_edge"]
