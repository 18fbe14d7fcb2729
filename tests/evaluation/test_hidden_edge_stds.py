import numpy as np
import pytest

from klbox_jax.evaluation.hidden_edge_stds import pair_edges
from klbox_jax.evaluation.matching import match_detections
from tests.evaluation.test_coco import dataset, result, truth


def test_pairs_by_hand():
    annotations = [
        truth([0, 0, 100, 100], bbox_std=[1, 2, 3, 4]),
        truth([300, 0, 100, 100], bbox_std=[1, 1, 1, 1]),
        truth([600, 0, 100, 100], bbox_std=[1, 1, 1, 8]),
        truth([900, 0, 100, 100], bbox_std=[9, 9, 9, 9]),
    ]
    stds = ([2.0, 4, 6, 8], [1.0, 1, 1, 1], [5.0, 7, 9, 3])
    results = [
        {**result([300 * i, 0, 100, 100], 0.9 - 0.1 * i), "bbox_std": std} for i, std in enumerate(stds)
    ]
    matches = match_detections(dataset(annotations), results)
    clear = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]], bool)
    other = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]], bool)
    # The second has no other edge, the fourth is not found.
    pairs = pair_edges(matches, clear, other)
    np.testing.assert_allclose(pairs.clear, [3, 7])
    np.testing.assert_allclose(pairs.other, [7, 3])
    np.testing.assert_allclose(pairs.true_clear, [1.5, 1])
    np.testing.assert_allclose(pairs.true_other, [3.5, 8])
    assert pairs.summary() == {
        "num": 2,
        "share_larger": 0.5,
        "median_ratio": pytest.approx((7 / 3 + 3 / 7) / 2),
        "true_median_ratio": pytest.approx((3.5 / 1.5 + 8) / 2),
    }
    nothing = pair_edges(matches, clear, np.zeros_like(other)).summary()
    assert nothing == {"num": 0, "share_larger": None, "median_ratio": None, "true_median_ratio": None}
