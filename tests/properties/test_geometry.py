import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.boxes import area, clip_to_image, pairwise_iou
from klbox_jax.ops.masks import crop_and_resize_masks
from klbox_jax.ops.matcher import Label, match_boxes
from klbox_jax.ops.precise_roi_pooling import precise_roi_pool
from klbox_jax.ops.roi_max_pooling import roi_max_pool
from klbox_jax.ops.roi_pooler import assign_boxes_to_levels
from klbox_jax.ops.roi_pooling import roi_align
from klbox_jax.ops.sampling import subsample_labels
from tests.cases import ground_truth
from tests.properties.cases import COUNT, SCALE, SHIFT, candidates
from tests.references.boxes import clustered_boxes

CODERS = [CornerBoxCoder(), CenterBoxCoder()]
STRIDE = 8
POOLS = {
    "align": functools.partial(roi_align, sampling_ratio=2, aligned=True),
    "align_unshifted": functools.partial(roi_align, sampling_ratio=2, aligned=False),
    "precise": precise_roi_pool,
    "max": roi_max_pool,
}


def two_sets(seed):
    rng = np.random.default_rng(seed)
    boxes = clustered_boxes(rng, 2 * COUNT)
    return boxes[:COUNT], boxes[COUNT:]


def test_iou_knows_no_place_no_unit_and_no_order():
    ours, theirs = two_sets(0)
    iou = np.asarray(pairwise_iou(jnp.asarray(ours), jnp.asarray(theirs)))
    assert (iou > 0.5).sum() > 10
    for scale, shift in ((1, SHIFT), (SCALE, SHIFT), (1 / SCALE, 0 * SHIFT)):
        moved = pairwise_iou(jnp.asarray(ours * scale + shift), jnp.asarray(theirs * scale + shift))
        np.testing.assert_array_equal(moved, iou)
    first, second = np.random.default_rng(1).permutation(COUNT), np.random.default_rng(2).permutation(COUNT)
    shuffled = pairwise_iou(jnp.asarray(ours[first]), jnp.asarray(theirs[second]))
    np.testing.assert_array_equal(shuffled, iou[first][:, second])
    turned = pairwise_iou(jnp.asarray(ours[:, [1, 0, 3, 2]]), jnp.asarray(theirs[:, [1, 0, 3, 2]]))
    np.testing.assert_array_equal(turned, iou)


def test_areas_and_clipping_grow_with_the_boxes():
    boxes, _ = two_sets(0)
    np.testing.assert_array_equal(area(jnp.asarray(boxes * SCALE)), area(jnp.asarray(boxes)) * SCALE**2)
    clipped = clip_to_image(jnp.asarray(boxes), jnp.array([90, 110]))
    assert (np.asarray(clipped) != boxes).any()
    larger = clip_to_image(jnp.asarray(boxes * SCALE), jnp.array([360, 440]))
    np.testing.assert_array_equal(larger, clipped * SCALE)
    np.testing.assert_array_equal(clip_to_image(clipped, jnp.array([90, 110])), clipped)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(("scale", "shift"), [(1, SHIFT), (4, 0 * SHIFT), (0.25, SHIFT)])
def test_offsets_know_no_place_and_no_unit(coder, scale, shift):
    boxes, references = two_sets(1)
    deltas = coder.encode(jnp.asarray(boxes), jnp.asarray(references))
    moved = jnp.asarray(boxes * scale + shift), jnp.asarray(references * scale + shift)
    np.testing.assert_allclose(coder.encode(*moved), deltas, rtol=1e-5, atol=1e-5)
    decoded = coder.decode(deltas, moved[1])
    np.testing.assert_allclose(decoded, boxes * scale + shift, rtol=1e-5, atol=1e-3)


def test_coded_stds_know_no_place_and_no_unit():
    coder = CornerBoxCoder()
    _, references = two_sets(1)
    stds = np.random.default_rng(0).uniform(0.5, 9, references.shape).astype(np.float32)
    coded = coder.encode_stds(jnp.asarray(stds), jnp.asarray(references))
    moved = jnp.asarray(references * SCALE + SHIFT)
    np.testing.assert_allclose(coder.encode_stds(jnp.asarray(stds * SCALE), moved), coded, rtol=1e-6)
    np.testing.assert_allclose(coder.decode_stds(coded, moved), stds * SCALE, rtol=1e-6)


@functools.partial(jax.jit, static_argnames=("spatial_scale", "method"))
def pool(features, boxes, spatial_scale, *, method):
    return POOLS[method](features, boxes, output_size=3, spatial_scale=spatial_scale)


def pool_boxes(seed):
    """Boxes well inside a map of 24 x 24 cells, at most half of it wide."""
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(5 * STRIDE, 10 * STRIDE, (20, 2)), rng.uniform(4, 9 * STRIDE, (20, 2))
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


@pytest.mark.parametrize("method", POOLS)
def test_a_box_takes_its_content_with_it(method):
    # Two views of one scene, 3 cells apart vertically and 2 horizontally.
    scene = np.random.default_rng(0).normal(size=(27, 26, 4)).astype(np.float32)
    boxes = pool_boxes(1)
    here = pool(jnp.asarray(scene[:24, :24]), jnp.asarray(boxes), 1 / STRIDE, method=method)
    moved = boxes - np.array([2, 3, 2, 3], np.float32) * STRIDE
    there = pool(jnp.asarray(scene[3:, 2:]), jnp.asarray(moved), 1 / STRIDE, method=method)
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(here)).mean() > 0.1


@pytest.mark.parametrize("method", POOLS)
def test_pooling_knows_no_unit_and_no_order(method):
    features = jnp.asarray(np.random.default_rng(0).normal(size=(24, 24, 4)), jnp.float32)
    boxes = pool_boxes(2)
    pooled = pool(features, jnp.asarray(boxes), 1 / STRIDE, method=method)
    finer = pool(features, jnp.asarray(boxes * 4), 1 / (4 * STRIDE), method=method)
    np.testing.assert_allclose(finer, pooled, rtol=1e-5, atol=1e-5)
    order = np.random.default_rng(3).permutation(len(boxes))
    shuffled = pool(features, jnp.asarray(boxes[order]), 1 / STRIDE, method=method)
    np.testing.assert_allclose(shuffled, np.asarray(pooled)[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", POOLS)
def test_pooling_turns_with_the_map(method):
    features = np.random.default_rng(0).normal(size=(24, 24, 4)).astype(np.float32)
    boxes = pool_boxes(4)
    pooled = pool(jnp.asarray(features), jnp.asarray(boxes), 1 / STRIDE, method=method)
    turned = pool(
        jnp.asarray(features.swapaxes(0, 1)), jnp.asarray(boxes[:, [1, 0, 3, 2]]), 1 / STRIDE, method=method
    )
    np.testing.assert_allclose(turned, np.asarray(pooled).swapaxes(1, 2), rtol=1e-4, atol=1e-4)


def test_the_level_of_a_box_is_that_of_its_size():
    boxes, _ = two_sets(3)
    boxes = boxes * np.random.default_rng(0).choice([1, 4, 16], (COUNT, 1)).astype(np.float32)
    levels = functools.partial(assign_boxes_to_levels, min_level=2, max_level=7)
    found = np.asarray(levels(jnp.asarray(boxes)))
    assert len(set(found.tolist())) > 3
    np.testing.assert_array_equal(levels(jnp.asarray(boxes + SHIFT)), found)
    # Twice as long sides, one level up.
    np.testing.assert_array_equal(
        levels(jnp.asarray(boxes * 2))[found > 0], np.minimum(found + 1, 5)[found > 0]
    )


def test_the_crop_of_a_mask_knows_no_place_and_no_unit():
    masks = jnp.asarray(np.random.default_rng(0).integers(0, 2, (COUNT, 8, 8)), jnp.uint8)
    mask_boxes, _ = two_sets(4)
    boxes = mask_boxes + np.random.default_rng(1).integers(-8, 8, mask_boxes.shape).astype(np.float32) / 2
    rows = jnp.arange(COUNT)
    crop = jax.jit(functools.partial(crop_and_resize_masks, output_size=7))
    covered = np.asarray(crop(masks, jnp.asarray(mask_boxes), jnp.asarray(boxes), rows))
    assert 0.3 < covered.mean() < 0.7
    for scale, shift in ((1, SHIFT), (SCALE, 0 * SHIFT)):
        moved = crop(masks, jnp.asarray(mask_boxes * scale + shift), jnp.asarray(boxes * scale + shift), rows)
        # Rounding decides where the interpolated mask is one half.
        assert (np.asarray(moved) != covered).mean() < 0.005
    order = np.random.default_rng(2).permutation(COUNT)
    shuffled = crop(masks[order], jnp.asarray(mask_boxes[order]), jnp.asarray(boxes[order]), rows)
    np.testing.assert_array_equal(shuffled, covered[order])


@jax.jit
def match(boxes, gt):
    return match_boxes(boxes, gt, thresholds=(0.4, 0.6), allow_low_quality_matches=True)


def test_matching_knows_no_place_no_unit_and_no_order():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        boxes = candidates(seed)["boxes"]
        # Objects of unequal sizes at unequal places: no box is as near to two of them.
        objects = boxes[:6] + rng.uniform(-4, 4, (6, 4)).astype(np.float32).round(1)
        is_crowd, valid = np.arange(6) == 5, np.arange(6) != 4
        found = jax.device_get(
            match(jnp.asarray(boxes), ground_truth(objects, is_crowd=is_crowd, valid=valid))
        )
        assert set(found.labels.tolist()) >= {Label.NEGATIVE, Label.POSITIVE}

        order, slots = rng.permutation(COUNT), rng.permutation(6)
        gt = ground_truth(objects[slots], is_crowd=is_crowd[slots], valid=valid[slots])
        shuffled = jax.device_get(match(jnp.asarray(boxes[order]), gt))
        np.testing.assert_array_equal(shuffled.labels, found.labels[order])
        np.testing.assert_array_equal(shuffled.iou, found.iou[order])
        overlaps = shuffled.iou > 0
        np.testing.assert_array_equal(
            slots[shuffled.gt_index][overlaps], found.gt_index[order][overlaps], err_msg=str(seed)
        )

        gt = ground_truth(objects * SCALE, is_crowd=is_crowd, valid=valid)
        larger = jax.device_get(match(jnp.asarray(boxes * SCALE), gt))
        for name in ("labels", "iou", "gt_index"):
            np.testing.assert_array_equal(getattr(larger, name), getattr(found, name), err_msg=name)


def test_slots_that_are_not_valid_match_nothing():
    for seed in range(4):
        boxes = candidates(seed)["boxes"]
        objects = np.concatenate([boxes[:3], boxes, 1e6 * np.ones((2, 4), np.float32)])[: COUNT // 2]
        few, many = np.ones(3, bool), np.arange(len(objects)) < 3
        found = jax.device_get(match(jnp.asarray(boxes), ground_truth(objects[:3], is_crowd=~few, valid=few)))
        # Garbage on top of every box, some of it called a crowd.
        gt = ground_truth(objects, is_crowd=~many & (np.arange(len(objects)) % 2 == 0), valid=many)
        padded = jax.device_get(match(jnp.asarray(boxes), gt))
        np.testing.assert_array_equal(padded.labels, found.labels)
        np.testing.assert_array_equal(padded.iou, found.iou)
        np.testing.assert_array_equal(padded.gt_index[found.iou > 0], found.gt_index[found.iou > 0])


def test_samples_are_counted_alike_in_any_order():
    labels = np.random.default_rng(0).choice([-1, 0, 1], 200, p=[0.3, 0.6, 0.1]).astype(np.int32)
    draw = jax.jit(functools.partial(subsample_labels, num_samples=64, positive_fraction=0.25))
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(200)
        found = jax.device_get(draw(jax.random.key(seed), jnp.asarray(labels[order])))
        assert found.valid.all()
        assert found.is_positive.sum() == min(16, (labels == 1).sum())
        assert len(set(found.indices.tolist())) == 64
        np.testing.assert_array_equal(labels[order][found.indices], found.is_positive.astype(np.int32))
