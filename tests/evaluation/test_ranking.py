import math

import numpy as np
import pytest

from klbox_jax.evaluation.ranking import (
    area_under_sparsification_error,
    sparsification_curve,
    spearman,
    worst_edge_share,
)
from tests.references import uncertainty as reference


def test_spearman_with_ties_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5.
    found = spearman(np.array([1.0, 2.0, 2.0, 9.0]), np.array([10.0, 20.0, 30.0, 40.0]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("seed", range(4))
def test_spearman_agrees_with_plain_loops(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 9, 40).astype(float), rng.normal(size=40).round(1)
    assert spearman(a, b) == pytest.approx(reference.spearman(a.tolist(), b.tolist()))


def test_spearman_without_an_order_is_none():
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert spearman(np.arange(5.0), np.ones(5)) is None
    assert spearman(np.zeros(0), np.zeros(0)) is None


def test_sparsification_by_hand():
    # By falling std the errors are 1, 4, 1: means of all 2, without the first 2.5, of the last alone 1.
    errors, stds = np.array([4.0, -1.0, 1.0]), np.array([2.0, 3.0, 1.0])
    np.testing.assert_allclose(sparsification_curve(errors, stds), [2, 2.5, 1])
    np.testing.assert_allclose(sparsification_curve(errors, np.abs(errors)), [2, 1, 1])
    # Gaps 0, 1.5, 0 over a mean error of 2.
    assert area_under_sparsification_error(errors, stds) == pytest.approx(1.5 / 3 / 2)


def test_equal_stds_count_as_their_mean():
    errors = np.array([1.0, 5.0, 3.0, 3.0])
    np.testing.assert_allclose(sparsification_curve(errors, np.ones(4)), [3, 3, 3, 3])
    shuffled = sparsification_curve(errors[::-1].copy(), np.array([1.0, 1.0, 2.0, 2.0]))
    np.testing.assert_allclose(shuffled, [3, 3, 3, 3])


@pytest.mark.parametrize("seed", range(4))
def test_sparsification_agrees_with_plain_loops(seed):
    rng = np.random.default_rng(seed)
    errors, stds = rng.normal(0, 2, 61), rng.permutation(61) + 1.0
    found = area_under_sparsification_error(errors, stds)
    assert found == pytest.approx(reference.ause(errors.tolist(), stds.tolist()))


def test_an_oracle_has_no_sparsification_error():
    errors = np.random.default_rng(0).normal(size=500)
    assert area_under_sparsification_error(errors, np.abs(errors)) == 0
    assert area_under_sparsification_error(errors, 7 * errors**2) == pytest.approx(0, abs=1e-12)
    worst = area_under_sparsification_error(errors, -np.abs(errors))
    assert worst > area_under_sparsification_error(errors, np.ones(500)) > 0
    assert area_under_sparsification_error(np.zeros(4), np.ones(4)) is None
    assert area_under_sparsification_error(np.zeros(0), np.zeros(0)) is None


def test_worst_edge_by_hand():
    true_stds = np.array(
        [
            [1, 3, 2, 1],  # y1, just clear
            [1, 1, 1, 3],  # y2
            [1, 2.9, 2, 1],  # not clear
            [5, 1, 1, 1],  # x1
            [0, 0, 0, 0],  # no noise at all
            [0, 0, 1, 0],  # x2
        ],
        float,
    )
    stds = np.array(
        [[1, 9, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1], [1, 1, 7, 1]], float
    )
    # Right, wrong, a tie of two, right: 2.5 of 4.
    assert worst_edge_share(stds, true_stds) == (2.5 / 4, 4)
    assert worst_edge_share(np.ones((6, 4)), true_stds) == (0.25, 4)
    assert worst_edge_share(np.zeros((0, 4)), np.zeros((0, 4))) == (None, 0)
