import numpy as np
import pytest

from klbox_jax.evaluation.score_iou_correlation import localization_confidences
from tests.evaluation.test_coco import dataset, result, truth
from tests.references.boxes import iou_of_pair
from tests.references.uncertainty import spearman

STDS = {"bbox_std": [1.0, 2.0, 3.0, 4.0]}


def test_points_by_hand():
    ground_truth = dataset([truth([0, 0, 100, 100]), truth([300, 0, 100, 50])])
    results = [
        {**result([0, 0, 100, 80], 0.4), **STDS},
        {**result([300, 0, 100, 50], 0.9), **STDS},
        {**result([310, 0, 100, 50], 0.3), **STDS},  # a duplicate
        {**result([600, 0, 100, 50], 0.8), **STDS},  # finds nothing
    ]
    found = localization_confidences(ground_truth, results)
    np.testing.assert_allclose(found.scores, [0.9, 0.4])
    np.testing.assert_allclose(found.ious, [1.0, 0.8])
    # (1 + 3) / 100 and (2 + 4) / 50, over four; then over 100 and 80.
    np.testing.assert_allclose(found.relative_stds, [(0.04 + 0.12) / 4, (0.04 + 0.075) / 4])
    assert found.predicted_ious is None
    assert found.spearman() == pytest.approx({"score": 1, "relative_std": 1, "predicted_iou": None})
    assert localization_confidences(ground_truth, results, min_score=0.5).scores.tolist() == [0.9]
    assert localization_confidences(ground_truth, results, iou_threshold=0.9).ious.tolist() == [1.0]


def test_correlations_agree_with_plain_loops():
    rng = np.random.default_rng(0)
    boxes = [[1000 * i, 0, *rng.uniform(80, 120, 2)] for i in range(40)]
    moved = [[x + rng.normal(0, 5), y, w * rng.uniform(0.9, 1.1), h] for x, y, w, h in boxes]
    scores, predicted_ious = rng.uniform(0.1, 1, 40).round(1), rng.uniform(0, 1, 40)
    stds = rng.uniform(1, 9, (40, 4))
    results = [
        {**result(box, float(score)), "bbox_std": std.tolist(), "predicted_iou": float(iou)}
        for box, score, std, iou in zip(moved, scores, stds, predicted_ious, strict=True)
    ]
    ground_truth = dataset([truth(box) for box in boxes])
    found = localization_confidences(ground_truth, results).spearman()
    ious = [
        iou_of_pair([x, y, x + w, y + h], [a, b, a + c, b + d])
        for (x, y, w, h), (a, b, c, d) in zip(boxes, moved, strict=True)
    ]
    relative = [
        (std[0] / w + std[2] / w + std[1] / h + std[3] / h) / 4
        for std, (_, _, w, h) in zip(stds.tolist(), moved, strict=True)
    ]
    assert found["score"] == pytest.approx(spearman(scores.tolist(), ious))
    assert found["relative_std"] == pytest.approx(spearman(relative, ious))
    assert found["predicted_iou"] == pytest.approx(spearman(predicted_ious.tolist(), ious))


def test_nothing_to_correlate():
    nothing = localization_confidences(dataset([truth([0, 0, 9, 9])]), [])
    assert nothing.spearman() == {"score": None, "relative_std": None, "predicted_iou": None}
    bare = localization_confidences(dataset([truth([0, 0, 9, 9])]), [result([0, 0, 9, 9], 0.5)])
    assert bare.relative_stds is None
    assert bare.ious.tolist() == [1.0]
