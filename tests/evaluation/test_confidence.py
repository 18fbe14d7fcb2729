import numpy as np
import pytest

from klbox_jax.evaluation.confidence import (
    percentile_interval,
    ratio_interval,
    ratio_of_medians,
    student_interval,
)


def test_students_interval():
    # Of 1, 2 and 3: mean 2, standard error 1 / sqrt(3), and the t of two degrees of freedom is 4.3027.
    low, high = student_interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.3027 / np.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.3027 / np.sqrt(3), abs=1e-4)
    assert student_interval([1.0]) is None


def test_students_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [
        low <= 0 <= high
        for low, high in (student_interval(rng.normal(0, 3, 5).tolist()) for _ in range(2000))
    ]
    assert abs(np.mean(covered) - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 2000)


def test_the_percentile_interval_holds_the_central_draws():
    low, high = percentile_interval(np.arange(1001.0))
    assert (low, high) == (pytest.approx(25.0), pytest.approx(975.0))


def test_the_ratio_is_that_of_the_medians():
    # Medians 3 and 6; the mean of ours is far off.
    assert ratio_of_medians((1.0, 3.0, 100.0), (5.0, 6.0, 7.0)) == 0.5


def test_the_interval_holds_what_repeats_and_widens_with_noise():
    rng = np.random.default_rng(3)
    quiet, noisy = ((5.0 * rng.lognormal(0, std, 40)).tolist() for std in (0.01, 0.3))
    peer = tuple(10.0 * rng.lognormal(0, 0.01, 40))
    narrow, wide = ratio_interval(tuple(quiet), peer), ratio_interval(tuple(noisy), peer)
    assert narrow[0] <= 0.5 <= narrow[1]
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    # Both sides slow down together, pair by pair: the ratio is known exactly.
    slowed = np.array(noisy)
    np.testing.assert_allclose(ratio_interval(tuple(slowed), tuple(2 * slowed)), 0.5)
    # One pair is all there is to draw.
    assert ratio_interval((3.0,), (4.0,)) == (0.75, 0.75)


def test_the_ratio_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        ours, peer = rng.lognormal(0, 0.2, 30), rng.lognormal(np.log(2), 0.2, 30)
        low, high = ratio_interval(tuple(ours), tuple(peer))
        covered += low <= 0.5 <= high
    # 95 are expected, with a standard deviation of 2.2.
    assert covered >= 88
