import functools

import jax
import numpy as np
import pytest

from klbox_jax.ops.nms import hard_nms
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.postprocess.suppression import suppress
from tests.properties.cases import COUNT, SCALE, SHIFT, candidates, on_device, take, with_garbage

METHODS = ("hard_nms", "hard", "soft_linear", "soft_gaussian", "iou_guided")


@functools.partial(jax.jit, static_argnames=("method", "nms_threshold", "soft_nms_threshold"))
def call(case, *, method, nms_threshold, soft_nms_threshold):
    """Any of them, with a slot for every candidate."""
    boxes, scores, classes, valid = (case[name] for name in ("boxes", "scores", "classes", "valid"))
    if method == "hard_nms":
        return hard_nms(boxes, scores, valid, classes=classes, iou_threshold=nms_threshold)
    settings = PostprocessSettings(
        suppression=method,
        nms_threshold=nms_threshold,
        soft_nms_threshold=soft_nms_threshold,
        detections_per_image=len(scores),
    )
    every = Candidates(boxes=boxes, scores=scores, classes=classes, valid=valid, predicted_ious=case["ious"])
    return suppress(every, settings)


def kept(case, method, *, nms_threshold=0.5, soft_nms_threshold=0.3):
    """Rows and scores of what is kept, best first."""
    result = call(
        on_device(case), method=method, nms_threshold=nms_threshold, soft_nms_threshold=soft_nms_threshold
    )
    result = jax.device_get(result)
    rows = result.indices[result.valid]
    scores = case["scores"][rows] if method == "hard_nms" else result.scores[result.valid]
    return rows, scores


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_candidates_does_not_matter(method):
    for seed in range(8):
        case = candidates(seed)
        rows, scores = kept(case, method)
        assert 5 < len(rows) <= COUNT
        order = np.random.default_rng(100 + seed).permutation(COUNT)
        other_rows, other_scores = kept(take(case, order), method)
        np.testing.assert_array_equal(order[other_rows], rows)
        np.testing.assert_array_equal(other_scores, scores)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_not_valid_do_not_matter(method):
    for seed in range(8):
        case = candidates(seed)
        padded, where = with_garbage(case, 100 + seed)
        rows, scores = kept(case, method)
        other_rows, other_scores = kept(padded, method)
        np.testing.assert_array_equal(other_rows, where[rows])
        np.testing.assert_array_equal(other_scores, scores)


@pytest.mark.parametrize("method", METHODS)
def test_the_place_and_the_unit_do_not_matter(method):
    for seed in range(8):
        case = candidates(seed)
        rows, scores = kept(case, method)
        for boxes in (case["boxes"] + SHIFT, case["boxes"] * SCALE, (case["boxes"] + SHIFT) / SCALE):
            moved_rows, moved_scores = kept({**case, "boxes": boxes}, method)
            np.testing.assert_array_equal(moved_rows, rows)
            np.testing.assert_array_equal(moved_scores, scores)


@pytest.mark.parametrize("method", ["hard_nms", "hard", "iou_guided"])
def test_equal_scores_rank_by_row(method):
    # As if every row were a little worse than the one before: what ranks has four values, and is then made distinct.
    name = "ious" if method == "iou_guided" else "scores"
    for seed in range(8):
        case = candidates(seed)
        coarse = np.ceil(case[name] * 8) / 8
        assert len(np.unique(coarse)) == 4
        distinct = coarse - np.arange(COUNT) / 4096
        rows, _ = kept({**case, name: coarse.astype(np.float32)}, method)
        other_rows, _ = kept({**case, name: distinct.astype(np.float32)}, method)
        np.testing.assert_array_equal(rows, other_rows)


@pytest.mark.parametrize("method", METHODS)
def test_boxes_apart_and_equally_good_keep_their_order(method):
    case = candidates(0)
    case["boxes"] = (np.arange(COUNT)[:, None] * 100 + np.array([0, 0, 50, 50])).astype(np.float32)
    case["scores"][:], case["ious"][:] = 0.5, 0.5
    rows, scores = kept(case, method)
    np.testing.assert_array_equal(rows, np.flatnonzero(case["valid"]))
    np.testing.assert_array_equal(scores, 0.5)


# A chain of 100 pixel wide boxes, each 40 further than the one before: neighbours have the IoU 60 / 140 = 0.43, boxes
# two further 20 / 180 = 0.11, all others 0.
LENGTH = 1000
STEP, WIDTH = 40.0, 100.0


def chain(order):
    """The chain's links in the given order of their scores, as rows in the order of the chain."""
    starts = np.arange(LENGTH) * STEP
    boxes = np.stack([starts, np.zeros(LENGTH), starts + WIDTH, np.full(LENGTH, 10.0)], axis=1)
    scores = np.empty(LENGTH)
    scores[order] = 0.9 - 0.8 * np.arange(LENGTH) / LENGTH
    case = candidates(0, count=LENGTH) | {
        "boxes": boxes.astype(np.float32),
        "scores": scores.astype(np.float32),
        "ious": scores.astype(np.float32),
        "classes": np.zeros(LENGTH, np.int32),
        "valid": np.ones(LENGTH, bool),
    }
    return case


def chain_by_loop(scores, *, decay, min_score):
    """Picks of the chain, one after the other, in float64; the neighbours of a link are counted off."""
    scores, waiting = scores.astype(np.float64), np.ones(LENGTH, bool)
    picks = []
    while waiting.any():
        best = int(np.argmax(np.where(waiting, scores, -1.0)))
        picks.append((best, scores[best]))
        waiting[best] = False
        for distance in (1, 2):
            shared = WIDTH - distance * STEP
            factor = decay(shared / (2 * WIDTH - shared))
            for neighbour in (best - distance, best + distance):
                if 0 <= neighbour < LENGTH:
                    scores[neighbour] *= factor
        waiting &= scores >= min_score
    rows, scores = zip(*picks, strict=True)
    return np.array(rows), np.array(scores)


ORDERS = {
    "falling": np.arange(LENGTH),
    "rising": np.arange(LENGTH)[::-1],
    "random": np.random.default_rng(0).permutation(LENGTH),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["hard_nms", "hard", "iou_guided"])
def test_a_chain_falls_as_greedily_as_it_should(method, order):
    case = chain(ORDERS[order])
    expected, expected_scores = chain_by_loop(
        case["scores"], decay=lambda iou: float(iou <= 0.4), min_score=1e-6
    )
    if order != "random":
        # A link that falls takes no other with it: every second one stays.
        assert len(expected) == LENGTH // 2
    rows, scores = kept(case, method, nms_threshold=0.4)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, expected_scores.astype(np.float32))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["soft_linear", "soft_gaussian"])
def test_a_chain_decays_as_it_should(method, order):
    def decay(iou):
        if method == "soft_linear":
            return 1 - iou if iou >= 0.1 else 1.0
        return np.exp(-(iou**2) / 0.5)

    case = chain(ORDERS[order])
    expected, expected_scores = chain_by_loop(case["scores"], decay=decay, min_score=0.001)
    rows, scores = kept(case, method, soft_nms_threshold=0.1)
    # Every link is still there, most with less than they had.
    assert len(expected) == LENGTH
    np.testing.assert_array_equal(np.sort(rows), np.arange(LENGTH))
    score_of = np.empty(LENGTH)
    score_of[expected] = expected_scores
    np.testing.assert_allclose(scores, score_of[rows], rtol=1e-5)
    assert (scores < case["scores"][rows]).sum() > LENGTH // 2
    # The order is that of the loop, but for scores that rounding makes equal.
    assert (np.diff(score_of[rows]) <= 1e-5 * score_of[rows][1:]).all()
    assert (rows == expected).mean() > 0.98
