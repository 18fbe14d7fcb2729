import numpy as np
import pytest

from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.precision_recall import RECALL_LEVELS, precision_by_class
from tests.evaluation.test_coco import dataset, random_set, result, truth


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("iou_threshold", "position"), [(0.5, 0), (0.75, 5), (0.95, 9)])
def test_the_mean_of_the_curves_is_average_precision(seed, iou_threshold, position):
    ground_truth, results = random_set(seed)
    for number, entry in enumerate(results):
        entry["score"] += (
            number * 1e-6
        )  # pycocotools has an order of its own for equal scores of several images
    curves = precision_by_class(ground_truth, results, iou_threshold=iou_threshold)
    assert list(curves) == ["cat", "dog", "emu", "fox"]
    assert curves["fox"] is None
    mean = np.mean([curve for curve in curves.values() if curve is not None])
    expected = evaluate_detections(ground_truth, results)["AP_by_iou"][position]
    assert 100 * mean == pytest.approx(expected, abs=1e-8)


def test_a_curve_by_hand():
    # Best first: a hit, a miss, a hit; four objects. Precision 1 up to recall 1/4, 2/3 up to 2/4, then 0.
    ground_truth = dataset([truth([100 * i, 0, 10, 10]) for i in range(4)])
    results = [
        result([0, 0, 10, 10], 0.9),
        result([900, 0, 10, 10], 0.8),
        result([100, 0, 10, 10], 0.7),
    ]
    curve = precision_by_class(ground_truth, results, iou_threshold=0.5)["cat"]
    np.testing.assert_allclose(curve[RECALL_LEVELS <= 0.25], 1)
    np.testing.assert_allclose(curve[(RECALL_LEVELS > 0.25) & (RECALL_LEVELS <= 0.5)], 2 / 3)
    np.testing.assert_allclose(curve[RECALL_LEVELS > 0.5], 0)


def test_classes_without_detections_have_precision_0():
    curve = precision_by_class(dataset([truth([0, 0, 9, 9])]), [], iou_threshold=0.5)["cat"]
    np.testing.assert_array_equal(curve, np.zeros(101))
