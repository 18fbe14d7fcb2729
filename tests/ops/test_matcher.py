import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.anchors import AnchorGenerator
from klbox_jax.ops.matcher import Label, match_boxes
from tests.cases import ground_truth
from tests.references.boxes import clustered_boxes
from tests.references.matcher import match

RPN = {"thresholds": (0.3, 0.7), "allow_low_quality_matches": True}
ROI = {"thresholds": (0.5, 0.5), "allow_low_quality_matches": False}


@functools.partial(jax.jit, static_argnames=("thresholds", "allow_low_quality_matches"))
def jitted_match(boxes, gt, *, thresholds, allow_low_quality_matches):
    return match_boxes(boxes, gt, thresholds=thresholds, allow_low_quality_matches=allow_low_quality_matches)


def test_labels_order():
    assert Label.IGNORE < Label.NEGATIVE < Label.POSITIVE


def test_thresholds_by_hand():
    gt = ground_truth([[0, 0, 10, 10], [100, 0, 110, 10]])
    boxes = jnp.array(
        [
            [0.0, 0.0, 10.0, 10.0],  # IoU 1 with slot 0
            [100.0, 0.0, 110.0, 7.5],  # 0.75 with slot 1: at the upper threshold
            [100.0, 0.0, 110.0, 5.0],  # 0.5: between
            [0.0, 0.0, 10.0, 2.5],  # 0.25: at the lower threshold
            [0.0, 0.0, 10.0, 2.0],  # 0.2: below
            [50.0, 50.0, 60.0, 60.0],  # overlaps nothing
        ]
    )
    result = jitted_match(boxes, gt, thresholds=(0.25, 0.75), allow_low_quality_matches=False)
    np.testing.assert_array_equal(result.labels, [1, 1, -1, -1, 0, 0])
    np.testing.assert_array_equal(result.gt_index, [0, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(result.iou, [1, 0.75, 0.5, 0.25, 0.2, 0], rtol=1e-6)
    # With one threshold, as the box head has it, nothing is ignored.
    np.testing.assert_array_equal(jitted_match(boxes, gt, **ROI).labels, [1, 1, 1, 0, 0, 0])


def test_low_quality_matches_by_hand():
    gt = ground_truth([[0, 0, 10, 10], [0, 0, 10, 2], [200, 200, 210, 210]])
    boxes = jnp.array(
        [
            [0.0, 0.0, 10.0, 9.0],  # 0.9 with slot 0, 2 / 9 with slot 1
            [0.0, 0.0, 10.0, 8.0],  # 0.8 with slot 0, 2 / 8 with slot 1: the best that slot 1 has
            [0.0, 5.0, 10.0, 10.0],  # 0.5 with slot 0
            [50.0, 50.0, 60.0, 60.0],  # nothing; slot 2 has no overlap at all, so its best is no match
        ]
    )
    high = jitted_match(boxes, gt, thresholds=(0.3, 0.85), allow_low_quality_matches=False)
    np.testing.assert_array_equal(high.labels, [1, -1, -1, 0])
    low = jitted_match(boxes, gt, thresholds=(0.3, 0.85), allow_low_quality_matches=True)
    np.testing.assert_array_equal(low.labels, [1, 1, -1, 0])
    # The label changes; the matched slot stays the box's own best.
    np.testing.assert_array_equal(low.gt_index, [0, 0, 0, 0])


def test_tied_low_quality_matches_all_count():
    gt = ground_truth([[4, 0, 8, 4]])
    boxes = jnp.array([[0.0, 0.0, 6.0, 4.0], [6.0, 0.0, 12.0, 4.0], [0.0, 0.0, 5.0, 4.0]])  # 1/4, 1/4, 1/8
    result = jitted_match(boxes, gt, **RPN)
    np.testing.assert_array_equal(result.labels, [1, 1, 0])


def test_padding_is_never_matched():
    # A padded slot of zeros has IoU 0 with every box, and 0 is its own maximum.
    boxes = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    gt = ground_truth([[0, 0, 0, 0], [0, 0, 10, 10], [20, 20, 30, 30]], valid=[False, True, False])
    result = jitted_match(boxes, gt, **RPN)
    np.testing.assert_array_equal(result.labels, [0, 1, 0])
    np.testing.assert_array_equal(result.gt_index[1], 1)


@pytest.mark.parametrize("settings", [RPN, ROI])
def test_no_ground_truth_is_all_negative(settings):
    boxes = clustered_boxes(np.random.default_rng(0), 30)
    result = jitted_match(jnp.asarray(boxes), ground_truth(boxes[:3], valid=[False] * 3), **settings)
    np.testing.assert_array_equal(result.labels, np.zeros(30))
    np.testing.assert_array_equal(result.iou, np.zeros(30))


@pytest.mark.parametrize(("boxes", "slots"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sets(boxes, slots):
    for matcher in (match_boxes, jitted_match):
        gt = jax.tree.map(jnp.asarray, ground_truth(np.zeros((slots, 4))))
        result = matcher(jnp.ones((boxes, 4)), gt, **RPN)
        assert [leaf.dtype for leaf in jax.tree.leaves(result)] == [jnp.int32, jnp.int32, jnp.float32]
        for leaf in (result.gt_index, result.labels, result.iou):
            np.testing.assert_array_equal(leaf, np.zeros(boxes))


def test_crowd_by_hand():
    gt = ground_truth([[0, 0, 100, 100], [90, 0, 110, 20]], is_crowd=[True, False])
    boxes = jnp.array(
        [
            [0.0, 0.0, 100.0, 100.0],  # the crowd itself: not matched, ignored
            [90.0, 0.0, 110.0, 20.0],  # an object that is half inside the crowd: still positive
            [95.0, 50.0, 105.0, 60.0],  # exactly half inside: ignored
            [96.0, 50.0, 106.0, 60.0],  # 0.4 inside: negative
            [200.0, 0.0, 210.0, 10.0],
        ]
    )
    for settings in (RPN, ROI):
        result = jitted_match(boxes, gt, **settings)
        np.testing.assert_array_equal(result.labels, [-1, 1, -1, 0, 0])
        np.testing.assert_array_equal(result.gt_index[1], 1)
    no_crowd = ground_truth(gt.boxes, is_crowd=[True, False], valid=[False, True])
    np.testing.assert_array_equal(jitted_match(boxes, no_crowd, **ROI).labels, [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    "settings", [RPN, ROI, {"thresholds": (0.4, 0.6), "allow_low_quality_matches": True}]
)
def test_equals_loops(settings):
    low, high = settings["thresholds"]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        boxes = clustered_boxes(rng, 130)
        boxes, gt_boxes = boxes[:120], np.concatenate([boxes[100:], boxes[:2]])  # some are gt themselves
        is_crowd, valid = rng.uniform(size=32) < 0.15, rng.uniform(size=32) < 0.7
        gt = ground_truth(gt_boxes, is_crowd=is_crowd, valid=valid)
        slots, labels, ious = match(
            boxes,
            gt_boxes,
            is_crowd,
            valid,
            low=low,
            high=high,
            allow_low_quality_matches=settings["allow_low_quality_matches"],
        )
        assert {0, 1} <= set(labels)
        for matcher in (match_boxes, jitted_match) if seed == 0 else (jitted_match,):
            result = matcher(jnp.asarray(boxes), jax.tree.map(jnp.asarray, gt), **settings)
            np.testing.assert_array_equal(result.labels, labels)
            np.testing.assert_array_equal(result.gt_index, slots)
            np.testing.assert_allclose(result.iou, ious, atol=1e-6)


def test_every_object_has_a_positive_anchor_under_jit_and_vmap():
    anchors = AnchorGenerator(sizes=((16.0,), (32.0,)), aspect_ratios=(0.5, 1.0, 2.0), strides=(8, 16)).grid(
        (120, 152)
    )
    anchors = jnp.concatenate([jnp.asarray(level) for level in anchors])
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 100, (64, 1, 2))
    gt_boxes = np.concatenate([corner, corner + rng.uniform(1, 30, (64, 1, 2))], axis=-1).astype(np.float32)
    result = jax.jit(jax.vmap(lambda one: match_boxes(anchors, one, **RPN)))(ground_truth(gt_boxes))
    # However small or odd, an object inside the grid is somebody's best.
    assert (np.asarray(result.labels) == Label.POSITIVE).any(axis=1).all()


def test_one_trace_for_any_count():
    traces = []

    @jax.jit
    def counted(boxes, gt):
        traces.append(boxes.shape)
        return match_boxes(boxes, gt, **RPN)

    boxes = jnp.asarray(clustered_boxes(np.random.default_rng(0), 30))
    for count in (0, 2, 5):
        counted(boxes, ground_truth(boxes[:5], valid=np.arange(5) < count))
    assert len(traces) == 1
