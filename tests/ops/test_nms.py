import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.ops.nms import hard_nms
from tests.references.boxes import clustered_boxes
from tests.references.nms import greedy_nms

jitted_nms = jax.jit(hard_nms, static_argnames=("iou_threshold", "max_outputs"))


def kept_rows(result):
    valid = np.asarray(result.valid)
    assert (valid == np.sort(valid)[::-1]).all()
    assert (np.asarray(result.indices)[~valid] == 0).all()
    return np.asarray(result.indices)[valid]


def random_case(seed, count):
    rng = np.random.default_rng(seed)
    boxes = clustered_boxes(rng, count)
    boxes[count // 2 : count // 2 + count // 10] = boxes[: count // 10]
    scores = rng.integers(0, 30, count).astype(np.float32) / 30  # many ties
    return boxes, scores, rng.uniform(size=count) < 0.85, rng.integers(0, 3, count).astype(np.int32)


@pytest.mark.parametrize("count", [20, 64, 400])
@pytest.mark.parametrize("iou_threshold", [0.2, 0.3, 0.5, 0.7])
def test_equals_greedy_nms(count, iou_threshold):
    suppressed = 0
    for seed in range(5 if count < 100 else 2):
        boxes, scores, valid, classes = random_case(seed, count)
        for some_classes in (None, classes) if iou_threshold == 0.3 else (classes,):
            expected = greedy_nms(boxes, scores, valid, iou_threshold=iou_threshold, classes=some_classes)
            result = jitted_nms(boxes, scores, valid, iou_threshold=iou_threshold, classes=some_classes)
            np.testing.assert_array_equal(kept_rows(result), expected)
            suppressed += valid.sum() - len(expected)
    assert suppressed > 0


def test_by_hand():
    boxes = jnp.array(
        [
            [0.0, 0.0, 10.0, 10.0],
            [0.0, 0.0, 10.0, 5.0],  # IoU exactly 0.5 with row 0
            [0.0, 0.0, 10.0, 9.0],  # IoU 0.9 with row 0
            [50.0, 50.0, 60.0, 60.0],
            [50.0, 50.0, 60.0, 60.0],  # a duplicate with the same score
        ]
    )
    scores, valid = jnp.array([0.8, 0.7, 0.9, 0.3, 0.3]), jnp.ones(5, bool)
    # Row 2 removes row 0 (0.9) and row 1 (5 / 9); row 3 comes before its twin.
    np.testing.assert_array_equal(kept_rows(jitted_nms(boxes, scores, valid, iou_threshold=0.5)), [2, 3])
    # Without row 2, row 0 leaves row 1 alone: the threshold itself does not suppress.
    without = valid.at[2].set(False)
    np.testing.assert_array_equal(kept_rows(jitted_nms(boxes, scores, without, iou_threshold=0.5)), [0, 1, 3])
    # In different classes the twins both stay.
    classes = jnp.array([0, 0, 0, 0, 1])
    result = jitted_nms(boxes, scores, valid, iou_threshold=0.5, classes=classes)
    np.testing.assert_array_equal(kept_rows(result), [2, 3, 4])


def test_a_removed_box_removes_nothing():
    # 0 removes 1; 1 would remove 2, but is gone; so 2 stays and removes 3. In a chain that is settled one box
    # a round, 100 boxes need 100 rounds.
    count = 100
    left = 4.0 * np.arange(count, dtype=np.float32)
    boxes = np.stack([left, np.zeros(count), left + 10, np.ones(count)], axis=1).astype(np.float32)
    scores = np.linspace(1, 0.1, count, dtype=np.float32)
    # Neighbours overlap by 6 of 14 = 0.43, the next ones by 2 of 18 = 0.11.
    result = jitted_nms(boxes, scores, np.ones(count, bool), iou_threshold=0.4)
    np.testing.assert_array_equal(kept_rows(result), np.arange(0, count, 2))


def test_the_best_fill_the_slots():
    boxes, scores, valid, _ = random_case(7, 120)
    all_kept = kept_rows(jitted_nms(boxes, scores, valid, iou_threshold=0.5))
    assert len(all_kept) > 9
    few = jitted_nms(boxes, scores, valid, iou_threshold=0.5, max_outputs=9)
    assert few.indices.shape == few.valid.shape == (9,)
    np.testing.assert_array_equal(kept_rows(few), all_kept[:9])
    many = jitted_nms(boxes, scores, valid, iou_threshold=0.5, max_outputs=150)
    assert many.indices.shape == many.valid.shape == (150,)
    np.testing.assert_array_equal(kept_rows(many), all_kept)


def test_jit_and_vmap_equal_eager():
    cases = [random_case(seed, 64) for seed in range(4)]
    boxes, scores, valid, classes = (jnp.stack(part) for part in zip(*cases, strict=True))
    nms = functools.partial(hard_nms, iou_threshold=0.3)
    batched = jax.jit(jax.vmap(lambda b, s, v, c: nms(b, s, v, classes=c)))(boxes, scores, valid, classes)
    eager = nms(boxes[0], scores[0], valid[0], classes=classes[0])
    np.testing.assert_array_equal(batched.indices[0], eager.indices)
    for image in range(4):
        single = jitted_nms(
            boxes[image], scores[image], valid[image], iou_threshold=0.3, classes=classes[image]
        )
        np.testing.assert_array_equal(batched.indices[image], single.indices)
        np.testing.assert_array_equal(batched.valid[image], single.valid)


def test_invalid_rows_change_nothing():
    boxes, scores, valid, classes = random_case(3, 50)
    expected = kept_rows(jitted_nms(boxes, scores, valid, iou_threshold=0.3, classes=classes))
    more_boxes = np.concatenate([boxes, np.tile(boxes[:1], (14, 1)), np.full((2, 4), np.nan)]).astype(
        np.float32
    )
    more_scores = np.concatenate([scores, np.full(14, 9.0), np.full(2, np.nan)]).astype(np.float32)
    more_valid = np.concatenate([valid, np.zeros(16, bool)])
    more_classes = np.concatenate([classes, np.tile(classes[:1], 16)])
    result = jitted_nms(more_boxes, more_scores, more_valid, iou_threshold=0.3, classes=more_classes)
    np.testing.assert_array_equal(kept_rows(result), expected)


def test_nothing_valid():
    boxes, scores, valid, _ = random_case(3, 50)
    assert len(kept_rows(jitted_nms(boxes, scores, np.zeros_like(valid), iou_threshold=0.3))) == 0


@pytest.mark.parametrize("max_outputs", [None, 0, 3])
def test_no_rows(max_outputs):
    arguments = {"iou_threshold": 0.5, "max_outputs": max_outputs}
    for nms in (hard_nms, jitted_nms):
        for classes in (None, jnp.zeros(0, jnp.int32)):
            rows = (jnp.zeros((0, 4)), jnp.zeros(0), jnp.zeros(0, bool))
            result = nms(*rows, classes=classes, **arguments)
            assert result.indices.shape == result.valid.shape == (max_outputs or 0,)
            assert result.indices.dtype == jnp.int32
            assert len(kept_rows(result)) == 0


@pytest.mark.parametrize("tenths", range(1, 10))
def test_an_iou_equal_to_the_threshold_does_not_remove(tenths):
    # The second box covers a share of the first; torchvision removes it where float32 rounds the threshold up.
    boxes = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, tenths]])
    assert float(pairwise_iou(boxes, boxes)[0, 1]) == float(jnp.float32(tenths / 10))
    result = jitted_nms(boxes, jnp.array([0.9, 0.8]), jnp.ones(2, bool), iou_threshold=tenths / 10)
    np.testing.assert_array_equal(kept_rows(result), [0, 1])


def test_one_trace_for_any_contents():
    traces = []

    @jax.jit
    def counted(boxes, scores, valid):
        traces.append(boxes.shape)
        return hard_nms(boxes, scores, valid, iou_threshold=0.3)

    for seed in range(3):
        counted(*random_case(seed, 40)[:3])
    assert len(traces) == 1
