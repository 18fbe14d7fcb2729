import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.postprocess.voting import variance_voting

# IoU of the two: 80 / 120 = 2/3.
BOXES = jnp.array([[0.0, 0, 10, 10], [2.0, 0, 12, 10]])
VARIANCES = jnp.array([[1.0, 1, 4, 1], [1.0, 1, 1, 1]])
SAME = jnp.zeros(2, jnp.int32)
ALL = jnp.ones(2, bool)


def vote(kept=slice(0, 1), classes=SAME, valid=ALL, variances=VARIANCES, **options):
    return variance_voting(
        BOXES[kept], classes[kept], BOXES, jnp.asarray(variances), classes, valid, **options
    )


def test_by_hand():
    # p of the second is exp(-(1/3)^2 / 0.1) = q. x1: (0 + 2 q) / (1 + q). x2: (10 / 4 + 12 q) / (1/4 + q).
    q = math.exp(-1 / 9 / 0.1)
    result = vote(sigma_t=0.1)
    np.testing.assert_allclose(
        result.boxes, [[2 * q / (1 + q), 0, (2.5 + 12 * q) / (0.25 + q), 10]], rtol=1e-6
    )
    # The variance is averaged with the same weights: x2 (1/4 * 4 + q * 1) / (1/4 + q).
    np.testing.assert_allclose(result.variances, [[1, 1, (1 + q) / (0.25 + q), 1]], rtol=1e-6)


def test_reported_variances_are_averaged_and_have_no_weight():
    q = math.exp(-1 / 9 / 0.1)
    reported = jnp.array([[9.0, 9, 9, 9], [25.0, 25, 25, 25]])
    result = vote(sigma_t=0.1, reported_variances=reported)
    np.testing.assert_array_equal(result.boxes, vote(sigma_t=0.1).boxes)
    assert result.variances[0, 0] == pytest.approx((9 + 25 * q) / (1 + q), rel=1e-6)
    assert result.variances[0, 2] == pytest.approx((9 / 4 + 25 * q) / (1 / 4 + q), rel=1e-6)


def test_duplicates_do_not_shrink_the_variance():
    count = 50
    result = variance_voting(
        BOXES[:1],
        SAME[:1],
        jnp.tile(BOXES[:1], (count, 1)),
        jnp.full((count, 4), 3.0),
        jnp.zeros(count, jnp.int32),
        jnp.ones(count, bool),
    )
    np.testing.assert_allclose(result.boxes, BOXES[:1], rtol=1e-6)
    np.testing.assert_allclose(result.variances, np.full((1, 4), 3), rtol=1e-6)


@pytest.mark.parametrize("case", ["other class", "not valid", "apart"])
def test_no_neighbour_no_change(case):
    options = {
        "other class": {"classes": jnp.arange(2)},
        "not valid": {"valid": jnp.array([True, False]), "variances": VARIANCES.at[1].set(jnp.nan)},
        "apart": {"variances": VARIANCES},
    }[case]
    if case == "apart":
        boxes = BOXES.at[1].add(10.0)
        result = variance_voting(boxes[:1], SAME[:1], boxes, VARIANCES, SAME, ALL)
    else:
        result = vote(**options)
    np.testing.assert_array_equal(result.boxes, BOXES[:1])
    np.testing.assert_array_equal(result.variances, VARIANCES[:1])


def test_certain_neighbour_wins():
    # p is 0.0039, but a millionth of the variance outweighs it: off by 2 / 3900.
    certain = jnp.array([[1e3] * 4, [1e-3] * 4])
    np.testing.assert_allclose(vote(variances=certain).boxes, BOXES[1:], atol=1e-3)


def test_without_a_vote_the_box_stays():
    # An empty box has IoU 0 even with itself.
    point = jnp.array([[5.0, 5, 5, 5]])
    result = variance_voting(point, SAME[:1], point, jnp.ones((1, 4)), SAME[:1], ALL[:1])
    np.testing.assert_array_equal(result.boxes, point)
    np.testing.assert_array_equal(result.variances, np.zeros((1, 4)))


def test_voted_boxes_stay_between_their_voters():
    rng = np.random.default_rng(0)
    corner = 1300 + rng.uniform(0, 20, (200, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.uniform(10, 30, (200, 2))], 1), jnp.float32)
    variances = jnp.exp(jnp.asarray(rng.uniform(-7, 7, (200, 4)), jnp.float32))
    classes, valid = jnp.zeros(200, jnp.int32), jnp.ones(200, bool)
    result = variance_voting(boxes, classes, boxes, variances, classes, valid)
    assert (result.boxes >= boxes.min(0)[None] - 1e-3).all()
    assert (result.boxes <= boxes.max(0)[None] + 1e-3).all()


def test_gradients_are_finite_beside_padding():
    def total(boxes, variances):
        result = variance_voting(boxes, SAME, boxes, variances, SAME, jnp.array([True, False]))
        return result.boxes.sum() + result.variances.sum()

    gradients = jax.grad(total, argnums=(0, 1))(BOXES.at[1].set(0.0), VARIANCES.at[1].set(0.0))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_sigma_t_must_be_positive():
    with pytest.raises(ValueError, match="sigma_t"):
        vote(sigma_t=0.0)
