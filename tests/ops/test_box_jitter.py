import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.box_jitter import jitter_boxes
from tests.cases import ground_truth
from tests.references.boxes import iou_of_pair

IMAGE_SIZE = np.array([80, 120], np.int32)


@functools.partial(jax.jit, static_argnames=("num_samples", "min_iou"))
def jitter(key, gt, *, num_samples=64, min_iou=0.5):
    return jitter_boxes(key, gt, jnp.asarray(IMAGE_SIZE), num_samples=num_samples, min_iou=min_iou)


OBJECTS = ground_truth(
    [[40, 30, 70, 50], [0, 0, 30, 40], [10, 10, 90, 70], [20, 20, 100, 60], [5, 5, 9, 9]],
    is_crowd=[False, False, False, True, False],
    valid=[True, True, True, True, False],
)


@pytest.mark.parametrize("min_iou", [0.5, 0.3])
def test_the_iou_is_that_of_the_box_and_never_too_small(min_iou):
    found = jitter(jax.random.key(0), OBJECTS, min_iou=min_iou)
    assert found.boxes.shape == (64, 4)
    assert found.valid.all()
    for box, index, iou in zip(found.boxes, found.gt_index, found.iou, strict=True):
        np.testing.assert_allclose(iou, iou_of_pair(box, OBJECTS.boxes[index]), atol=1e-5)
    assert min_iou <= found.iou.min() < min_iou + 0.1
    assert 0.9 < found.iou.max() < 1


def test_crowds_and_padding_are_left_alone_and_the_rest_shared_out():
    # 64 rows over 3 objects: 22, 21 and 21, the odd one to any of them.
    odd_ones = set()
    for seed in range(8):
        found = jitter(jax.random.key(seed), OBJECTS)
        counts = np.bincount(found.gt_index, minlength=5)
        assert sorted(counts[:3]) == [21, 21, 22]
        assert not counts[3:].any()
        odd_ones.add(int(counts.argmax()))
    assert len(odd_ones) > 1


def test_objects_without_area_are_left_alone():
    gt = ground_truth([[40, 30, 70, 50], [10, 10, 10, 30], [20, 40, 50, 40]])
    found = jitter(jax.random.key(0), gt)
    assert found.valid.all()
    assert not found.gt_index.any()


def test_more_objects_than_rows():
    found = jitter(
        jax.random.key(0), ground_truth([[i, i, i + 20, i + 30] for i in range(40)]), num_samples=8
    )
    assert len(set(np.asarray(found.gt_index).tolist())) == 8


def test_ious_are_balanced():
    gt = ground_truth([[40, 30, 70, 50]])
    found = jitter(jax.random.key(1), gt, num_samples=4000)
    share = np.histogram(found.iou, bins=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0])[0] / 4000
    # A fifth each; the standard deviation of a share is sqrt(0.2 * 0.8 / 4000) = 0.006.
    np.testing.assert_allclose(share, 0.2, atol=0.03)
    offsets = (np.asarray(found.boxes) - gt.boxes) / np.array([30, 20, 30, 20])
    # All edges alike, inward as often as outward: a growing edge has further to go than a shrinking one.
    inward = (offsets * np.array([1, 1, -1, -1]) > 0).mean(axis=0)
    np.testing.assert_allclose(inward, 0.5, atol=0.04)
    assert (np.abs(offsets) > 1e-4).all(axis=1).mean() > 0.99


def test_boxes_stay_in_the_image_and_an_object_that_fills_it_only_shrinks():
    gt = ground_truth([[0, 0, 120, 80]])
    found = jitter(jax.random.key(2), gt, num_samples=400)
    boxes = np.asarray(found.boxes)
    assert (boxes >= 0).all()
    assert (boxes <= np.array([120, 80, 120, 80])).all()
    assert found.valid.all()
    # A direction that only grows, one of 16, leaves the object as it is.
    unmoved = (np.asarray(found.iou) == 1).mean()
    assert 0.02 < unmoved < 0.12


def test_an_object_that_reaches_out_of_the_image():
    # Three quarters of the first lie inside, two fifths of the second.
    found = jitter(jax.random.key(3), ground_truth([[-10, 20, 30, 60], [90, -30, 110, 20]]))
    valid = np.asarray(found.valid)
    np.testing.assert_array_equal(valid.sum(), 32)
    assert (np.asarray(found.gt_index)[valid] == 0).all()
    assert (np.asarray(found.iou)[valid] <= 0.75 + 1e-6).all()
    assert (np.asarray(found.boxes) >= 0).all()


@pytest.mark.parametrize(
    "gt",
    [
        ground_truth([[0, 0, 50, 50], [np.nan] * 4], is_crowd=[True, False], valid=[True, False]),
        ground_truth([[0, 0, 0, 0], [20, 20, 20, 50]], valid=[False, True]),  # no object has an area
        ground_truth(np.zeros((0, 4))),  # no slot
    ],
)
def test_without_objects_nothing_is_valid_and_all_is_finite(gt):
    found = jitter(jax.random.key(0), gt)
    assert not found.valid.any()
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, 0)


def test_padding_changes_no_number_of_a_valid_row_but_the_draw():
    # NaN in a padded slot never gets out.
    gt = ground_truth([[40, 30, 70, 50], [np.nan] * 4], valid=[True, False])
    found = jitter(jax.random.key(0), gt)
    assert found.valid.all()
    assert np.isfinite(found.boxes).all()
    assert not found.gt_index.any()


def test_one_key_one_draw_and_jit_equals_eager():
    one, same, other = (jitter(jax.random.key(seed), OBJECTS) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.boxes, same.boxes)
    assert (np.asarray(one.boxes) != np.asarray(other.boxes)).all(axis=1).mean() > 0.9
    gt = jax.tree.map(jnp.asarray, OBJECTS)
    eager = jitter_boxes(jax.random.key(5), gt, jnp.asarray(IMAGE_SIZE), num_samples=64)
    np.testing.assert_array_equal(one.gt_index, eager.gt_index)
    np.testing.assert_allclose(one.boxes, eager.boxes, atol=1e-3)
    np.testing.assert_allclose(one.iou, eager.iou, atol=1e-4)


def test_a_batch_equals_its_images_in_one_trace():
    traces = []

    @jax.jit
    def batched(keys, gt, sizes):
        traces.append(1)
        return jax.vmap(functools.partial(jitter_boxes, num_samples=16))(keys, gt, sizes)

    more = OBJECTS.replace(valid=np.array([True, False, False, False, True]))
    keys = jax.random.split(jax.random.key(0), 2)
    for images in ((OBJECTS, more), (more, OBJECTS)):
        gt = jax.tree.map(lambda *leaves: np.stack(leaves), *images)
        found = batched(keys, gt, np.stack([IMAGE_SIZE] * 2))
        for i, image in enumerate(images):
            single = jitter(keys[i], image, num_samples=16)
            np.testing.assert_array_equal(found.gt_index[i], single.gt_index)
            np.testing.assert_allclose(found.boxes[i], single.boxes, atol=1e-3)
    assert len(traces) == 1
