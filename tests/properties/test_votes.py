import functools

import jax
import numpy as np
import pytest

from klbox_jax.postprocess.fusion import bayes_fusion, weighted_boxes_fusion
from klbox_jax.postprocess.voting import (
    box_voting,
    iou_voting,
    variance_voting,
)
from tests.properties.cases import COUNT, KEPT, SCALE, SHIFT, candidates, on_device, take, with_garbage

METHODS = ("variance", "variance_score", "iou", "iou_score", "box_voting", "bayes")


@functools.partial(jax.jit, static_argnames="method")
def vote(kept, case, *, method):
    """Any of the votes, of some candidates for `kept` ones."""
    first = (kept["boxes"], kept["classes"], case["boxes"])
    last = (case["classes"], case["valid"])
    if method == "bayes":
        return bayes_fusion(*first, case["pixel_variances"], *last, affinity=0.4)
    reported = {"reported_variances": case["pixel_variances"]}
    if method == "box_voting":
        return box_voting(*first, case["scores"], *last, **reported, iou_threshold=0.4)
    scores = case["scores"] if method.endswith("_score") else None
    options = {**reported, "sigma_t": 0.1, "candidate_scores": scores}
    if method in ("iou", "iou_score"):
        return iou_voting(*first, *last, **options)
    return variance_voting(*first, case["variances"], *last, **options)


@jax.jit
def fuse(case):
    return weighted_boxes_fusion(
        *(case[name] for name in ("boxes", "scores", "classes", "valid")),
        reported_variances=case["pixel_variances"],
    )


def voted(kept, case, method):
    result = jax.device_get(vote(on_device(kept), on_device(case), method=method))
    return result.boxes, result.variances


def random_vote(seed):
    case = candidates(seed)
    return take(case, np.flatnonzero(case["valid"])[:KEPT]), case


@pytest.mark.parametrize("method", METHODS)
def test_neither_the_order_of_voters_nor_that_of_the_kept_matters(method):
    for seed in range(8):
        kept, case = random_vote(seed)
        boxes, variances = voted(kept, case, method)
        assert np.abs(boxes - kept["boxes"]).max() > 0.5
        rng = np.random.default_rng(100 + seed)
        order, kept_order = rng.permutation(COUNT), rng.permutation(KEPT)
        other_boxes, other_variances = voted(take(kept, kept_order), take(case, order), method)
        np.testing.assert_allclose(other_boxes, boxes[kept_order], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(other_variances, variances[kept_order], rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_voters_that_are_not_valid_do_not_matter(method):
    for seed in range(8):
        kept, case = random_vote(seed)
        padded, _ = with_garbage(case, 100 + seed)
        boxes, variances = voted(kept, case, method)
        other_boxes, other_variances = voted(kept, padded, method)
        np.testing.assert_allclose(other_boxes, boxes, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(other_variances, variances, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_votes_move_with_the_boxes(method):
    for seed in range(8):
        kept, case = random_vote(seed)
        boxes, variances = voted(kept, case, method)
        moved = [each | {"boxes": each["boxes"] + SHIFT} for each in (kept, case)]
        moved_boxes, moved_variances = voted(*moved, method)
        np.testing.assert_allclose(moved_boxes, boxes + SHIFT, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(moved_variances, variances, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_votes_grow_with_the_boxes(method):
    # The variances of the offsets are those of parts of a side, and stay; those in pixels grow by the square.
    for seed in range(8):
        kept, case = random_vote(seed)
        boxes, variances = voted(kept, case, method)
        larger = [
            each | {"boxes": each["boxes"] * SCALE, "pixel_variances": each["pixel_variances"] * SCALE**2}
            for each in (kept, case)
        ]
        larger_boxes, larger_variances = voted(*larger, method)
        np.testing.assert_allclose(larger_boxes, boxes * SCALE, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(larger_variances, variances * SCALE**2, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_ratio_of_weights_matters(method):
    for seed in range(4):
        kept, case = random_vote(seed)
        boxes, variances = voted(kept, case, method)
        lighter = {**case, "scores": case["scores"] / 8, "variances": case["variances"] * 16}
        other_boxes, other_variances = voted(kept, lighter, method)
        np.testing.assert_allclose(other_boxes, boxes, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(other_variances, variances, rtol=1e-5)


def test_fused_clusters_are_the_same_between_rows_that_are_not_valid():
    for seed in range(8):
        case = candidates(seed)
        padded, where = with_garbage(case, 100 + seed)
        result, other = jax.device_get((fuse(on_device(case)), fuse(on_device(padded))))
        count = int(result.valid.sum())
        assert count == other.valid.sum() < case["valid"].sum()
        np.testing.assert_array_equal(other.indices[:count], where[result.indices[:count]])
        np.testing.assert_array_equal(other.classes[:count], result.classes[:count])
        for name in ("boxes", "scores", "variances"):
            ours, theirs = getattr(other, name)[:count], getattr(result, name)[:count]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4, err_msg=name)


def test_fused_clusters_move_and_grow_with_the_boxes():
    for seed in range(8):
        case = candidates(seed)
        result = jax.device_get(fuse(on_device(case)))
        valid = result.valid
        for scale, shift in ((1, SHIFT), (SCALE, 0 * SHIFT)):
            other = {
                **case,
                "boxes": case["boxes"] * scale + shift,
                "pixel_variances": case["pixel_variances"] * np.float32(scale) ** 2,
            }
            moved = jax.device_get(fuse(on_device(other)))
            np.testing.assert_array_equal(moved.valid, valid)
            np.testing.assert_array_equal(moved.indices, result.indices)
            expected = result.boxes[valid] * scale + shift
            np.testing.assert_allclose(moved.boxes[valid], expected, rtol=1e-5, atol=1e-3)
            np.testing.assert_allclose(moved.variances, result.variances * scale**2, rtol=1e-5)


def test_equal_scores_are_fused_by_row():
    # As if every row were a little worse than the one before.
    for seed in range(8):
        case = candidates(seed)
        coarse = np.ceil(case["scores"] * 8) / 8
        assert len(np.unique(coarse)) == 4
        distinct = (coarse - np.arange(COUNT) / 2**20).astype(np.float32)
        results = [
            jax.device_get(fuse(on_device({**case, "scores": scores})))
            for scores in (coarse.astype(np.float32), distinct)
        ]
        np.testing.assert_array_equal(results[0].indices, results[1].indices)
        np.testing.assert_array_equal(results[0].valid, results[1].valid)
