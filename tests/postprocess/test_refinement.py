import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.precise_roi_pooling import precise_roi_pool
from klbox_jax.postprocess.refinement import refine_boxes
from tests.references.refinement import refine_box

# A smooth hill over each object: exp(-sum of squared errors of the edges, in units of its width).
WIDTH = 8.0


def predict_one(box, target):
    return np.exp(-np.square((np.asarray(box, np.float64) - target) / WIDTH).sum())


def gradient_one(box, target):
    return predict_one(box, target) * -2 * (np.asarray(box, np.float64) - target) / WIDTH**2


def hill(targets):
    return lambda boxes: jnp.exp(-jnp.sum(jnp.square((boxes - targets) / WIDTH), axis=1))


def random_case(count=40, *, seed=0, spread=4.0):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (count, 2))
    targets = np.concatenate([corners, corners + rng.uniform(6, 40, (count, 2))], axis=1)
    boxes = targets + rng.normal(0, 1, (count, 4)) * rng.uniform(0, spread, (count, 1))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    return boxes.astype(np.float32), targets.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("num_steps", "step_size", "keep_best"))
def refine(boxes, targets, **arguments):
    return refine_boxes(boxes, hill(targets), **arguments)


@pytest.mark.parametrize("step_size", [0.5, 2.0])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_against_the_loops(num_steps, step_size):
    boxes, targets = random_case()
    arguments = {"num_steps": num_steps, "step_size": step_size}
    last = refine(boxes, targets, **arguments)
    best = refine(boxes, targets, keep_best=True, **arguments)
    reasons = []
    for row, (box, target) in enumerate(zip(boxes, targets, strict=True)):
        places, predictions, reason = refine_box(
            box,
            functools.partial(predict_one, target=target.astype(np.float64)),
            functools.partial(gradient_one, target=target.astype(np.float64)),
            **arguments,
        )
        reasons.append(reason)
        np.testing.assert_allclose(last.boxes[row], places[-1], atol=2e-3)
        np.testing.assert_allclose(last.predicted_ious[row], predictions[-1], atol=1e-4)
        np.testing.assert_allclose(best.predicted_ious[row], max(predictions), atol=1e-4)
        np.testing.assert_allclose(best.boxes[row], places[int(np.argmax(predictions))], atol=2e-3)
    # Small steps climb, large ones overshoot; every rule is seen at work.
    if num_steps == 5:
        assert set(reasons) == {"settled", "out of steps"} | ({"degenerated"} if step_size == 2.0 else set())


def test_small_steps_raise_the_prediction():
    boxes, targets = random_case(seed=1)
    before = np.asarray(hill(targets)(boxes))
    after = refine(boxes, targets)
    assert after.predicted_ious.mean() > before.mean() + 0.05
    error_before, error_after = (np.abs(np.asarray(b) - targets).mean() for b in (boxes, after.boxes))
    assert error_after < 0.9 * error_before


def test_keep_best_lowers_no_prediction_and_the_paper_does():
    boxes, targets = random_case(seed=2)
    before = np.asarray(hill(targets)(boxes))
    papers, best = (refine(boxes, targets, step_size=5.0, keep_best=keep_best) for keep_best in (False, True))
    assert (np.asarray(papers.predicted_ious) < before - 0.05).any()
    assert (np.asarray(best.predicted_ious) >= before).all()
    for result in (papers, best):
        np.testing.assert_allclose(hill(targets)(result.boxes), result.predicted_ious, atol=1e-6)


def test_steps_by_hand():
    # A slope of 0.01 a pixel in x1 alone; sides 10 and 20. A step of 0.5 moves x1 by 0.5 * 0.01 * 10 = 0.05,
    # the next one by 0.5 * 0.01 * 9.95, and no other edge moves.
    def slope(boxes):
        return 0.01 * boxes[:, 0]

    boxes = jnp.array([[0.0, 0, 10, 20]])
    found = refine_boxes(boxes, slope, num_steps=2, early_stop=0.0)
    np.testing.assert_allclose(found.boxes, [[0.09975, 0, 10, 20]], rtol=1e-5)
    np.testing.assert_allclose(found.predicted_ious, [0.0009975], rtol=1e-5)
    # The first gain is 0.0005, less than 0.001: the box stops there, the step it took remains.
    found = refine_boxes(boxes, slope, num_steps=2)
    np.testing.assert_allclose(found.boxes, [[0.05, 0, 10, 20]], rtol=1e-5)
    found = refine_boxes(boxes, slope, num_steps=0)
    np.testing.assert_array_equal(found.boxes, boxes)
    np.testing.assert_array_equal(found.predicted_ious, [0])


def test_a_fall_within_the_tolerance_goes_on_and_a_deeper_one_stops():
    # A ridge at x1 = 0 with slopes of 0.1. From -0.2, where the width is 10, x1 goes 0.5 * 0.1 * 10 = 0.5 to 0.3,
    # and the prediction falls by 0.01, from -0.02 to -0.03. There the width is 9.5: 0.475 back, to -0.175.
    def ridge(boxes):
        return -0.1 * jnp.abs(boxes[:, 0])

    boxes = jnp.array([[-0.2, 0.0, 9.8, 20]])
    through = refine_boxes(boxes, ridge, num_steps=2, degeneration_tolerance=-0.011)
    np.testing.assert_allclose(through.boxes[0, 0], -0.175, atol=1e-5)
    # For good, also where no change is too small to go on.
    stopped = refine_boxes(boxes, ridge, num_steps=4, early_stop=0.0, degeneration_tolerance=-0.009)
    np.testing.assert_allclose(stopped.boxes[0, 0], 0.3, atol=1e-5)
    kept = refine_boxes(boxes, ridge, num_steps=2, degeneration_tolerance=-0.009, keep_best=True)
    np.testing.assert_array_equal(kept.boxes, boxes)


def test_empty_boxes_stay_whatever_their_gradient():
    def predict(boxes):
        # The area of an empty box has a square root without a slope: its gradient is not finite.
        return jnp.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) / 100

    boxes = jnp.array([[0.0, 0, 0, 0], [5.0, 5, 25, 45], [30, 30, 20, 20]])
    for keep_best in (False, True):
        found = jax.jit(functools.partial(refine_boxes, predict_iou=predict, keep_best=keep_best))(boxes)
        np.testing.assert_array_equal(found.boxes[jnp.array([0, 2])], boxes[jnp.array([0, 2])])
        assert found.boxes[1, 2] > 25
        assert np.isfinite(found.predicted_ious).all()


def test_through_precise_pooling():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(12, 12, 4)).cumsum(axis=0).cumsum(axis=1) / 10, jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4)) / 8, jnp.float32)

    def predict(boxes):
        pooled = precise_roi_pool(features, boxes, output_size=3, spatial_scale=1 / 8)
        return jnp.einsum("nsqc,sqc->n", pooled, kernel)

    corners = rng.uniform(0, 50, (20, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 40, (20, 2))], axis=1)
    boxes = jnp.asarray(np.concatenate([boxes, np.zeros((4, 4))]), jnp.float32)
    before = predict(boxes)
    after = jax.jit(functools.partial(refine_boxes, predict_iou=predict))(boxes)
    gain = np.asarray(after.predicted_ious - before)
    assert gain[:20].mean() > 0.01
    assert np.isfinite(after.boxes).all()
    np.testing.assert_array_equal(after.boxes[20:], 0)
    np.testing.assert_allclose(gain[20:], 0, atol=1e-6)


def test_jit_equals_eager_and_rows_are_their_own():
    boxes, targets = random_case(10, seed=3)
    eager = refine_boxes(jnp.asarray(boxes), hill(targets))
    compiled = refine(boxes, targets)
    np.testing.assert_allclose(eager.boxes, compiled.boxes, atol=1e-4)
    alone = refine(boxes[4:5], targets[4:5])
    np.testing.assert_allclose(alone.boxes[0], compiled.boxes[4], atol=1e-5)
    np.testing.assert_allclose(alone.predicted_ious[0], compiled.predicted_ious[4], atol=1e-6)
