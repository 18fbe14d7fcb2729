import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.nms import hard_nms
from klbox_jax.postprocess.soft_nms import soft_nms
from klbox_jax.postprocess.suppression import suppress

# Along one row: the IoU of neighbours is 6 / 14, of the first and third 2 / 18.
CHAIN = jnp.array([[0.0, 0, 10, 10], [4.0, 0, 14, 10], [8.0, 0, 18, 10]])
SCORES = jnp.array([0.9, 0.8, 0.7])
ONE_CLASS = jnp.zeros(3, jnp.int32)
ALL = jnp.ones(3, bool)


def test_hard_by_hand():
    # 1 falls to 0, and so cannot take 2 with it.
    result = suppress(
        CHAIN, SCORES, ONE_CLASS, ALL, method="hard", nms_threshold=0.4, min_score=0.5, max_outputs=3
    )
    np.testing.assert_array_equal(result.indices, [0, 2, 0])
    np.testing.assert_array_equal(result.valid, [True, True, False])
    np.testing.assert_array_equal(result.scores, jnp.array([0.9, 0.7, 0.0]))


def test_hard_is_strict():
    # IoU exactly 1/2 is not above 1/2.
    boxes = jnp.array([[0.0, 0, 3, 1], [1.0, 0, 4, 1], [0.0, 0, 3, 1]])
    result = suppress(boxes, SCORES, ONE_CLASS, ALL, method="hard", nms_threshold=0.5, max_outputs=3)
    np.testing.assert_array_equal(result.indices[:2], [0, 1])
    assert result.valid.sum() == 2


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_hard_equals_hard_nms(threshold):
    rng = np.random.default_rng(int(threshold * 10))
    corner = rng.integers(0, 80, (200, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.integers(5, 40, (200, 2))], 1), jnp.float32)
    scores = jnp.asarray(rng.integers(1, 50, 200) / 50, jnp.float32)
    classes, valid = jnp.asarray(rng.integers(0, 3, 200)), jnp.asarray(rng.random(200) < 0.8)
    ours = suppress(boxes, scores, classes, valid, method="hard", nms_threshold=threshold, max_outputs=50)
    other = hard_nms(boxes, scores, valid, iou_threshold=threshold, max_outputs=50, classes=classes)
    np.testing.assert_array_equal(ours.valid, other.valid)
    rows = np.asarray(ours.valid)
    np.testing.assert_array_equal(ours.indices[rows], other.indices[rows])


def test_soft_methods_are_soft_nms():
    for method, name in (("soft_linear", "linear"), ("soft_gaussian", "gaussian")):
        ours = suppress(
            CHAIN,
            SCORES,
            ONE_CLASS,
            ALL,
            method=method,
            soft_nms_sigma=0.3,
            soft_nms_threshold=0.2,
            min_score=0.01,
            max_outputs=3,
        )
        direct = soft_nms(
            CHAIN,
            SCORES,
            ONE_CLASS,
            ALL,
            method=name,
            sigma=0.3,
            iou_threshold=0.2,
            min_score=0.01,
            max_outputs=3,
        )
        np.testing.assert_array_equal(ours.scores, direct.scores)
        assert (ours.scores[1:] < SCORES[1:]).any()


def test_iou_guided_needs_predictions():
    boxes, one = jnp.array([[0.0, 0.0, 4.0, 4.0]]), jnp.ones(1)
    with pytest.raises(ValueError, match="needs predicted_ious"):
        suppress(boxes, one, jnp.zeros(1, jnp.int32), one > 0, method="iou_guided", max_outputs=1)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="soft_gaussian"):
        suppress(CHAIN, SCORES, ONE_CLASS, ALL, method="matrix", max_outputs=3)
