import math

import numpy as np
import pytest

from klbox_jax.evaluation.calibration_error import (
    LEVELS,
    calibration_curve,
    calibration_errors,
    coverage,
    expected_normalized_calibration_error,
)
from tests.references.uncertainty import calibration_gaps, ence


@pytest.fixture(scope="module")
def calibrated():
    rng = np.random.default_rng(0)
    stds = np.exp(rng.normal(0, 1, (20_000, 4)))
    return rng.normal(0, stds), stds


@pytest.mark.parametrize(("sigmas", "share"), [(1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)])
def test_calibrated_stds_cover_what_they_should(calibrated, sigmas, share):
    errors, stds = calibrated
    standard_error = math.sqrt(share * (1 - share) / errors.size)
    assert coverage(errors, stds, sigmas=sigmas) == pytest.approx(share, abs=4 * standard_error)


def test_coverage_by_hand():
    # 1, 2, 3 and 3 stds away; the border belongs to it.
    errors, stds = np.array([1.0, -4.0, 3.0, -6.0]), np.array([1.0, 2.0, 1.0, 2.0])
    assert [coverage(errors, stds, sigmas=k) for k in (0.5, 1.0, 2.0, 3.0)] == [0, 0.25, 0.5, 1]
    assert coverage(np.zeros(0), np.zeros(0), sigmas=1.0) is None


def test_curve_of_calibrated_stds_is_the_diagonal(calibrated):
    errors, stds = calibrated
    curve = calibration_curve(errors[:, 0], stds[:, 0])
    np.testing.assert_allclose(curve, LEVELS, atol=4 * 0.5 / math.sqrt(len(errors)))
    gaps = calibration_errors(errors, stds)
    assert gaps["ECE"] < 0.005
    assert gaps["MCE_squared"] < 1e-4


def test_curve_by_hand():
    # Errors of -s, 0, +s: the labels lie at the .841, .5 and .159 quantile. k/15 first exceeds .159 at k = 3,
    # .5 at k = 8, .841 at k = 13.
    curve = calibration_curve(np.array([-2.0, 0.0, 2.0]), np.array([2.0, 2.0, 2.0]))
    np.testing.assert_allclose(curve, np.repeat([0, 1 / 3, 2 / 3, 1], [2, 5, 5, 2]))


def test_a_bias_shows_with_its_sign():
    # The prediction is too far right: labels lie low in their predicted distributions.
    errors, stds = np.full(50, 1.0), np.ones(50)
    assert (calibration_curve(errors, stds) >= LEVELS - 3 / 15).all()
    assert calibration_curve(errors, stds)[7] == 1
    assert calibration_curve(-errors, stds)[7] == 0


@pytest.mark.parametrize("seed", range(3))
def test_calibration_errors_agree_with_plain_loops(seed):
    rng = np.random.default_rng(seed)
    errors, stds = rng.normal(0.5, 2, (57, 4)), np.exp(rng.normal(0, 1, (57, 4)))
    gaps = np.array([calibration_gaps(errors[:, e], stds[:, e]) for e in range(4)])
    found = calibration_errors(errors, stds)
    assert found["ECE_squared"] == pytest.approx((gaps**2).mean())
    assert found["MCE_squared"] == pytest.approx((gaps**2).max(axis=1).mean())
    assert found["ECE"] == pytest.approx(np.abs(gaps).mean())
    assert found["MCE"] == pytest.approx(np.abs(gaps).max(axis=1).mean())
    np.testing.assert_allclose(list(found["curve"].values()), gaps + np.arange(1, 15) / 15)
    assert list(found["curve"]) == ["x1", "y1", "x2", "y2"]


def test_ence_of_calibrated_stds_is_what_chance_leaves(calibrated):
    errors, stds = calibrated
    left = 1 / math.sqrt(math.pi * errors.size / 10)
    assert expected_normalized_calibration_error(errors.ravel(), stds.ravel()) < 3 * left
    # Half as large everywhere: |1/2 s - s| / (1/2 s) = 1.
    halved = expected_normalized_calibration_error(errors.ravel(), 0.5 * stds.ravel())
    assert halved == pytest.approx(1, abs=6 * left)


@pytest.mark.parametrize("count", [10, 11, 57, 200])
def test_ence_agrees_with_plain_loops(count):
    rng = np.random.default_rng(count)
    errors, stds = rng.normal(0, 2, count), np.exp(rng.normal(0, 1, count))
    assert expected_normalized_calibration_error(errors, stds) == pytest.approx(ence(errors, stds))


def test_ence_by_hand():
    # Two bins: stds 1, 1 with errors 1, 1 are right; stds 2, 2 with errors 1, 7 have RMS 5: 3 / 2.
    errors, stds = np.array([1.0, 7.0, 1.0, -1.0]), np.array([2.0, 2.0, 1.0, 1.0])
    assert expected_normalized_calibration_error(errors, stds, num_bins=2) == pytest.approx(0.75)
    assert expected_normalized_calibration_error(errors[:1], stds[:1]) == pytest.approx(0.5)


def test_nothing_has_no_score():
    nothing = np.zeros((0, 4))
    assert set(calibration_errors(nothing, nothing).values()) == {None}
    assert set(calibration_errors(nothing, nothing)) == set(calibration_errors(nothing + 1, nothing + 1))
    assert expected_normalized_calibration_error(np.zeros(0), np.zeros(0)) is None
    assert np.isnan(calibration_curve(np.zeros(0), np.zeros(0))).all()
