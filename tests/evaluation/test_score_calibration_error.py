import copy
import json

import numpy as np
import pytest

from klbox_jax.evaluation.score_calibration_error import (
    d_ece,
    evaluate_scores,
    laace_0,
    laece_0,
    matched_scores,
    object_calibration_error,
    reliability_bins,
)
from tests.evaluation.test_coco import dataset, random_set, result, truth
from tests.references import score_calibration as reference


@pytest.mark.parametrize("seed", range(3))
def test_measures_agree_with_plain_loops(seed):
    rng = np.random.default_rng(seed)
    scores = np.where(rng.random(150) < 0.3, rng.integers(0, 26, 150) / 25, rng.random(150))
    ious = np.where(rng.random(150) < 0.5, rng.random(150), 0.0)
    classes = rng.integers(1, 5, 150)
    lists = scores.tolist(), ious.tolist(), classes.tolist()
    assert laece_0(scores, ious, classes) == pytest.approx(reference.laece_0(*lists))
    assert laace_0(scores, ious, classes) == pytest.approx(reference.laace_0(*lists))
    hits = [float(iou >= 0.5) for iou in ious]
    assert d_ece(scores, ious) == pytest.approx(reference.binned_error(lists[0], hits, 10))
    assert d_ece(scores, ious, num_bins=25) == pytest.approx(reference.binned_error(lists[0], hits, 25))


def test_measures_by_hand():
    # Bin (.88, .92]: scores .9, .9, IoUs .7 and 0: |.9 - .35| = .55. Bin (.08, .12]: score .1, IoU 0: .1.
    scores, ious = np.array([0.9, 0.9, 0.1]), np.array([0.7, 0.0, 0.0])
    assert laece_0(scores, ious, np.ones(3, int)) == pytest.approx(2 / 3 * 0.55 + 1 / 3 * 0.1)
    assert laace_0(scores, ious, np.ones(3, int)) == pytest.approx((0.2 + 0.9 + 0.1) / 3)
    assert d_ece(scores, ious) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.1)
    assert d_ece(scores, ious, iou_threshold=0.75) == pytest.approx(2 / 3 * 0.9 + 1 / 3 * 0.1)
    # Each class by itself, then their mean: (.2, and (.9 + .1) / 2).
    assert laece_0(scores, ious, np.array([1, 2, 2])) == pytest.approx((0.2 + 0.5) / 2)


def test_calibrated_scores_have_an_error_of_chance():
    rng = np.random.default_rng(0)
    scores = rng.random(50_000)
    hits = (rng.random(50_000) < scores).astype(float)
    assert d_ece(scores, hits) < 0.01
    assert d_ece(scores**2, hits) > 0.1


def test_bins_of_a_diagram():
    found = reliability_bins([0.0, 0.2, 0.200001, 1.0], [0.0, 1.0, 0.5, 1.0], num_bins=5)
    assert found.counts.tolist() == [2, 1, 0, 0, 1]
    np.testing.assert_allclose(found.mean_scores, [0.1, 0.200001, np.nan, np.nan, 1.0])
    np.testing.assert_allclose(found.mean_targets, [0.5, 0.5, np.nan, np.nan, 1.0])
    assert found.error() == pytest.approx(0.5 * 0.4 + 0.25 * 0.299999)
    fields = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert fields["mean_scores"][2] is None
    np.testing.assert_allclose(fields["edges"], [0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_nothing_has_no_score_and_a_count_of_zero():
    for measure in (laece_0, laace_0):
        assert measure([], [], []) is None
    assert d_ece([], []) is None
    ground_truth = dataset([truth([0, 0, 10, 10])])
    found = evaluate_scores(ground_truth, [])
    assert (found["num_detections"], found["num_matched"]) == (0, 0)
    assert found["D_ECE"] is found["LaECE_0"] is found["LaACE_0"] is None
    assert found["OCE"] == 1  # the object is missed
    assert evaluate_scores(dataset([]), [])["OCE"] is None


@pytest.mark.parametrize("seed", range(4))
def test_object_calibration_error_agrees_with_plain_loops(seed):
    ground_truth, results = random_set(seed)
    assert object_calibration_error(ground_truth, results) == pytest.approx(
        reference.oce(ground_truth, results)
    )


def test_object_calibration_error_by_hand():
    box = [0, 0, 10, 10]
    ground_truth = dataset([truth(box)], classes=((1, "cat"), (2, "dog")))

    def error(*results):
        return object_calibration_error(ground_truth, list(results))

    assert error(result(box, 1.0)) == 0
    assert error() == 1
    assert error(result(box, 1.0, category=2)) == 2  # surer and wrong is worse than missed
    assert error(result(box, 0.6)) == pytest.approx(0.16)
    # Means: cat (.8 + 0) / 2, dog .4 / 2.
    assert error(result(box, 0.8), result(box, 0.4, category=2)) == pytest.approx(0.36 + 0.04)
    # IoU .6: matched at .5 and missed at .75.
    assert error(result([0, 0, 10, 6], 1.0)) == pytest.approx(0.5)
    assert error(result(box, 1.0), result([50, 50, 9, 9], 0.9)) == 0  # false positives do not count
    crowd = dataset([truth(box), truth([40, 40, 9, 9], iscrowd=1)])
    assert object_calibration_error(crowd, [result(box, 1.0)]) == 0


def test_matched_scores_count_false_positives_and_leave_crowds_out():
    ground_truth = dataset([truth([0, 0, 10, 10]), truth([50, 50, 30, 30], iscrowd=1)])
    results = [
        result([0, 0, 10, 5], 0.9),
        result([0, 0, 10, 10], 0.8),  # its object is taken
        result([55, 55, 5, 5], 0.7),  # inside the crowd
        result([200, 200, 5, 5], 0.2),
    ]
    scores, ious, classes = matched_scores(ground_truth, results)
    assert scores.tolist() == [0.9, 0.8, 0.2]
    assert ious.tolist() == [0.5, 0, 0]
    assert classes.tolist() == [1, 1, 1]
    # At .75 the first one is no match, and the second one takes the object.
    assert matched_scores(ground_truth, results, iou_threshold=0.75)[1].tolist() == [0, 1, 0]
    assert matched_scores(ground_truth, results, min_score=0.5)[0].tolist() == [0.9, 0.8]


def test_all_measures_of_a_results_list():
    ground_truth, results = random_set(2)
    before = copy.deepcopy(results)
    found = evaluate_scores(ground_truth, results, min_score=0.35)
    assert results == before
    scores, ious, classes = matched_scores(ground_truth, results, min_score=0.35)
    assert found["num_detections"] == len(scores)
    assert found["num_matched"] == (ious > 0).sum() > 0
    assert found["LaECE_0"] == laece_0(scores, ious, classes)
    assert found["LaACE_0"] == laace_0(scores, ious, classes)
    at_half = matched_scores(ground_truth, results, iou_threshold=0.5, min_score=0.35)
    assert found["D_ECE"] == d_ece(*at_half[:2])
    shown = [entry for entry in results if entry["score"] >= 0.35]
    assert found["OCE"] == object_calibration_error(ground_truth, shown)
    assert sum(found["reliability"]["counts"]) == len(scores)
    json.dumps(found, allow_nan=False)


def test_scores_that_are_no_probabilities_are_refused():
    ground_truth = dataset([truth([0, 0, 10, 10])])
    for measure in (object_calibration_error, evaluate_scores):
        with pytest.raises(ValueError, match=r"scores\[0\] = 3.0 must be from 0 to 1"):
            measure(ground_truth, [result([0, 0, 10, 10], 3.0)])
