import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.postprocess.soft_nms import soft_nms

# Against the first box the second has IoU 50 / 150 = 1/3 and the third 80 / 120 = 2/3; the last lies apart.
BOXES = jnp.array([[0.0, 0, 10, 10], [5.0, 0, 15, 10], [2.0, 0, 12, 10], [50.0, 50, 60, 60]])
SCORES = jnp.array([0.9, 0.8, 0.7, 0.5])
ONE_CLASS = jnp.zeros(4, jnp.int32)
ALL = jnp.ones(4, bool)


def test_gaussian_by_hand():
    # After the pick of 0: 0.8 exp(-(1/3)^2 / 0.5) = 0.640, 0.7 exp(-(2/3)^2 / 0.5) = 0.288, 0.5.
    # After the pick of 1, whose IoU with 2 is 70 / 130: 0.288 exp(-(7/13)^2 / 0.5). Then 3, then 2.
    result = soft_nms(BOXES, SCORES, ONE_CLASS, ALL, method="gaussian", max_outputs=4)
    np.testing.assert_array_equal(result.indices, [0, 1, 3, 2])
    last = 0.7 * math.exp(-((2 / 3) ** 2) / 0.5) * math.exp(-((7 / 13) ** 2) / 0.5)
    np.testing.assert_allclose(
        result.scores, [0.9, 0.8 * math.exp(-((1 / 3) ** 2) / 0.5), 0.5, last], rtol=1e-6
    )
    assert result.valid.all()


def test_linear_by_hand():
    # Threshold 0.5: the pick of 0 leaves 1 alone and takes 2 to 0.7 / 3; the pick of 1 takes that times 6/13.
    result = soft_nms(
        BOXES, SCORES, ONE_CLASS, ALL, method="linear", iou_threshold=0.5, min_score=0.0, max_outputs=4
    )
    np.testing.assert_array_equal(result.indices, [0, 1, 3, 2])
    np.testing.assert_allclose(result.scores, [0.9, 0.8, 0.5, 0.7 / 3 * 6 / 13], rtol=1e-6)


def test_linear_decays_at_the_threshold_itself():
    # Two unit squares side by side in a row of IoU exactly 1/2: [0, 3] and [1, 4] share 2 of 4.
    boxes = jnp.array([[0.0, 0, 3, 1], [1.0, 0, 4, 1]])
    result = soft_nms(
        boxes,
        SCORES[:2],
        ONE_CLASS[:2],
        ALL[:2],
        method="linear",
        iou_threshold=0.5,
        max_outputs=2,
    )
    np.testing.assert_allclose(result.scores, [0.9, 0.4], rtol=1e-6)


def test_other_classes_are_left_alone():
    result = soft_nms(BOXES, SCORES, jnp.arange(4), ALL, method="gaussian", max_outputs=4)
    np.testing.assert_array_equal(result.scores, SCORES)


@pytest.mark.parametrize(("min_score", "picks"), [(0.4, 2), (np.float32(0.9), 1), (0.95, 0)])
def test_min_score_stays_in(min_score, picks):
    result = soft_nms(
        BOXES[jnp.array([0, 2, 3])],
        SCORES[jnp.array([0, 2, 3])],
        ONE_CLASS[:3],
        ALL[:3],
        method="linear",
        min_score=float(min_score),
        max_outputs=3,
    )
    assert result.valid.sum() == picks


def test_padding_is_never_picked_and_decays_nothing():
    valid = jnp.array([False, True, True, True])
    scores = jnp.array([jnp.nan, 0.8, 0.7, 0.5])
    result = soft_nms(BOXES, scores, ONE_CLASS, valid, method="gaussian", min_score=0.0, max_outputs=6)
    np.testing.assert_array_equal(result.indices, [1, 3, 2, 0, 0, 0])
    np.testing.assert_array_equal(result.valid, [True] * 3 + [False] * 3)
    np.testing.assert_array_equal(result.scores[3:], [0, 0, 0])
    assert np.isfinite(result.scores).all()


def test_ties_go_to_the_lower_row():
    result = soft_nms(BOXES, jnp.full(4, 0.5), jnp.arange(4), ALL, method="linear", max_outputs=4)
    np.testing.assert_array_equal(result.indices, [0, 1, 2, 3])


def test_fewer_outputs_are_a_cut_of_more():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (100, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.uniform(10, 40, (100, 2))], 1), jnp.float32)
    arguments = (
        boxes,
        jnp.asarray(rng.uniform(0, 1, 100), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 100)),
        jnp.ones(100, bool),
    )
    few = soft_nms(*arguments, method="gaussian", max_outputs=10)
    many = soft_nms(*arguments, method="gaussian", max_outputs=100)
    np.testing.assert_array_equal(few.indices, many.indices[:10])
    assert (np.diff(many.scores) <= 0).all()


def test_one_trace_and_equal_to_eager():
    traces = []

    @jax.jit
    def run(valid):
        traces.append(1)
        return soft_nms(BOXES, SCORES, ONE_CLASS, valid, method="gaussian", max_outputs=4)

    for valid in (ALL, ALL.at[0].set(False)):
        with jax.disable_jit():
            eager = soft_nms(BOXES, SCORES, ONE_CLASS, valid, method="gaussian", max_outputs=4)
        compiled = run(valid)
        np.testing.assert_array_equal(compiled.indices, eager.indices)
        np.testing.assert_allclose(compiled.scores, eager.scores, rtol=1e-6)
    assert len(traces) == 1


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="linear"):
        soft_nms(BOXES, SCORES, ONE_CLASS, ALL, method="cubic", max_outputs=4)
