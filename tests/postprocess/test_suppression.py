import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.nms import hard_nms
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.settings import SUPPRESSION_METHODS, PostprocessSettings
from klbox_jax.postprocess.soft_nms import soft_nms
from klbox_jax.postprocess.suppression import suppress

# Along one row: the IoU of neighbours is 6 / 14, of the first and third 2 / 18.
CHAIN = jnp.array([[0.0, 0, 10, 10], [4.0, 0, 14, 10], [8.0, 0, 18, 10]])
SCORES = jnp.array([0.9, 0.8, 0.7])
ONE_CLASS = jnp.zeros(3, jnp.int32)
ALL = jnp.ones(3, bool)


def kept(boxes, scores=SCORES, classes=ONE_CLASS, valid=ALL, ious=None, **settings):
    candidates = Candidates(boxes=boxes, scores=scores, classes=classes, valid=valid, predicted_ious=ious)
    return suppress(candidates, PostprocessSettings(**settings))


def test_hard_by_hand():
    # 1 falls to 0, and so cannot take 2 with it.
    result = kept(
        CHAIN, suppression="hard", nms_threshold=0.4, soft_nms_min_score=0.5, detections_per_image=3
    )
    np.testing.assert_array_equal(result.indices, [0, 2, 0])
    np.testing.assert_array_equal(result.valid, [True, True, False])
    np.testing.assert_array_equal(result.scores, jnp.array([0.9, 0.7, 0.0]))


def test_hard_is_strict():
    # IoU exactly 1/2 is not above 1/2.
    boxes = jnp.array([[0.0, 0, 3, 1], [1.0, 0, 4, 1], [0.0, 0, 3, 1]])
    result = kept(boxes, suppression="hard", nms_threshold=0.5, detections_per_image=3)
    np.testing.assert_array_equal(result.indices[:2], [0, 1])
    assert result.valid.sum() == 2


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_hard_equals_hard_nms(threshold):
    rng = np.random.default_rng(int(threshold * 10))
    corner = rng.integers(0, 80, (200, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.integers(5, 40, (200, 2))], 1), jnp.float32)
    scores = jnp.asarray(rng.integers(1, 50, 200) / 50, jnp.float32)
    classes, valid = jnp.asarray(rng.integers(0, 3, 200)), jnp.asarray(rng.random(200) < 0.8)
    settings = {"suppression": "hard", "nms_threshold": threshold, "detections_per_image": 50}
    ours = kept(boxes, scores, classes, valid, **settings)
    other = hard_nms(boxes, scores, valid, iou_threshold=threshold, max_outputs=50, classes=classes)
    np.testing.assert_array_equal(ours.valid, other.valid)
    rows = np.asarray(ours.valid)
    np.testing.assert_array_equal(ours.indices[rows], other.indices[rows])


def test_soft_methods_are_soft_nms():
    for method, name in (("soft_linear", "linear"), ("soft_gaussian", "gaussian")):
        ours = kept(
            CHAIN,
            suppression=method,
            soft_nms_sigma=0.3,
            soft_nms_threshold=0.2,
            soft_nms_min_score=0.01,
            detections_per_image=3,
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
    with pytest.raises(ValueError, match="needs predicted_ious"):
        kept(CHAIN, suppression="iou_guided", detections_per_image=1)
    result = kept(CHAIN, ious=jnp.array([0.1, 0.9, 0.2]), suppression="iou_guided", nms_threshold=0.4)
    assert result.indices[0] == 1


def test_unknown_method():
    with pytest.raises(ValueError, match="must be one of hard"):
        kept(CHAIN, suppression="matrix")


@dataclasses.dataclass(frozen=True)
class Halving:
    """A greedy suppression of a user's own: an overlapping box loses half of its score."""

    min_score: float = 0.01

    def __call__(self, iou):
        return jnp.where(iou > 0.2, 0.5, 1.0)


def test_a_method_of_ones_own_is_passed_as_a_value():
    result = kept(CHAIN, suppression=Halving(), detections_per_image=3)
    # 0.9 halves the second, 0.7 halves it again: 0.8 / 4.
    np.testing.assert_allclose(result.scores, [0.9, 0.7, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(result.indices, [0, 2, 1])


@pytest.mark.parametrize("method", SUPPRESSION_METHODS)
def test_no_candidates(method):
    nothing = jnp.zeros(0)
    result = kept(
        jnp.zeros((0, 4)),
        nothing,
        nothing.astype(jnp.int32),
        nothing.astype(bool),
        nothing,
        suppression=method,
        detections_per_image=3,
    )
    assert not result.valid.any()
    assert result.indices.shape == result.scores.shape == (3,)
