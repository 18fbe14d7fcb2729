import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.postprocess.iou_guided_nms import iou_guided_nms
from tests.references import iou_guided_nms as reference
from tests.references.boxes import clustered_boxes

jitted_nms = jax.jit(iou_guided_nms, static_argnames=("iou_threshold", "max_outputs"))


def random_case(seed, count):
    rng = np.random.default_rng(seed)
    boxes = clustered_boxes(rng, count)
    boxes[count // 2 : count // 2 + count // 10] = boxes[: count // 10]
    return (
        boxes,
        rng.integers(1, 30, count).astype(np.float32) / 30,
        rng.integers(0, 30, count).astype(np.float32) / 30,  # many ties
        rng.integers(0, 3, count).astype(np.int32),
        rng.uniform(size=count) < 0.85,
    )


def answer(result):
    """Pairs (row, score) of the valid slots, after a look at the others."""
    indices, scores, valid = (np.asarray(part) for part in jax.tree.leaves(result))
    assert (valid == np.sort(valid)[::-1]).all()
    assert (indices[~valid] == 0).all()
    assert (scores[~valid] == 0).all()
    return list(zip(indices[valid].tolist(), scores[valid].tolist(), strict=True))


@pytest.mark.parametrize("iou_threshold", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("count", [20, 64, 300])
def test_equals_the_picks_one_by_one(count, iou_threshold):
    raised = removed = 0
    for seed in range(5 if count < 100 else 2):
        case = random_case(seed, count)
        expected = reference.iou_guided_nms(*case, iou_threshold=iou_threshold)
        # Best score first; sorted() leaves equal scores in the order of the picks.
        expected = sorted(expected, key=lambda pick: -pick[1])
        result = jitted_nms(*case, iou_threshold=iou_threshold, max_outputs=count)
        assert answer(result) == expected
        few = jitted_nms(*case, iou_threshold=iou_threshold, max_outputs=7)
        assert answer(few) == expected[:7]
        raised += sum(score > case[1][row] for row, score in expected)
        removed += case[4].sum() - len(expected)
    assert raised > 0
    assert removed > 0


# In a row: neighbours have the IoU 6 / 14, the first and the third 2 / 18; the last lies apart.
CHAIN = jnp.array([[0.0, 0, 10, 10], [4.0, 0, 14, 10], [8.0, 0, 18, 10], [50.0, 50, 60, 60]])
ONE_CLASS = jnp.zeros(4, jnp.int32)
ALL = jnp.ones(4, bool)


def test_by_hand():
    # Box 1 is placed best and takes both neighbours with their scores; by score alone box 0 would have won
    # and box 2 survived.
    scores, ious = jnp.array([0.9, 0.3, 0.5, 0.6]), jnp.array([0.6, 0.8, 0.7, 0.2])
    result = jitted_nms(CHAIN, scores, ious, ONE_CLASS, ALL, iou_threshold=0.4, max_outputs=4)
    assert answer(result) == [(1, pytest.approx(0.9)), (3, pytest.approx(0.6))]
    # Ranked 0, 2, 1: box 1 lies in both clusters and belongs to the first pick, box 0.
    scores, ious = jnp.array([0.4, 0.9, 0.5, 0.6]), jnp.array([0.8, 0.6, 0.7, 0.2])
    result = jitted_nms(CHAIN, scores, ious, ONE_CLASS, ALL, iou_threshold=0.4, max_outputs=4)
    assert answer(result) == [(0, pytest.approx(0.9)), (3, pytest.approx(0.6)), (2, pytest.approx(0.5))]


def test_the_last_pick_may_have_the_best_score():
    scores, ious = jnp.array([0.2, 0.2, 0.3, 0.9]), jnp.array([0.9, 0.8, 0.7, 0.1])
    result = jitted_nms(CHAIN, scores, ious, ONE_CLASS, ALL, iou_threshold=0.9, max_outputs=1)
    assert answer(result) == [(3, pytest.approx(0.9))]


def test_other_classes_and_the_threshold_itself_remove_nothing():
    # [0, 3] and [1, 4] share 2 of 4.
    boxes = jnp.array([[0.0, 0, 3, 1], [1.0, 0, 4, 1], [0.0, 0, 3, 1]])
    scores, ious = jnp.array([0.5, 0.75, 0.25]), jnp.array([0.9, 0.8, 0.7])
    classes = jnp.array([0, 0, 1])
    result = jitted_nms(boxes, scores, ious, classes, ALL[:3], iou_threshold=0.5, max_outputs=3)
    assert answer(result) == [(1, 0.75), (0, 0.5), (2, 0.25)]


def test_invalid_rows_change_nothing():
    case = random_case(3, 50)
    expected = answer(jitted_nms(*case, iou_threshold=0.3, max_outputs=20))
    extra = (np.full((6, 4), np.nan), np.full(6, np.nan), np.full(6, np.nan), np.zeros(6), np.zeros(6, bool))
    twin = tuple(part[:1] for part in case[:4])
    # A duplicate of row 0 that outscores all, and rows of NaN.
    twin = (twin[0], np.full(1, 9.0), np.full(1, 9.0), twin[3], np.zeros(1, bool))
    longer = [np.concatenate(parts).astype(parts[0].dtype) for parts in zip(case, extra, twin, strict=True)]
    assert answer(jitted_nms(*longer, iou_threshold=0.3, max_outputs=20)) == expected


def test_empty_boxes_keep_their_own_score():
    boxes = jnp.zeros((3, 4))
    result = jitted_nms(
        boxes,
        jnp.array([0.5, 0.25, 0.75]),
        jnp.ones(3),
        ONE_CLASS[:3],
        ALL[:3],
        iou_threshold=0.5,
        max_outputs=5,
    )
    assert answer(result) == [(2, 0.75), (0, 0.5), (1, 0.25)]
    assert result.indices.shape == (5,)


def test_nothing_valid():
    case = random_case(3, 50)
    assert answer(jitted_nms(*case[:4], np.zeros(50, bool), iou_threshold=0.3, max_outputs=20)) == []


def test_vmap_and_jit_equal_eager_in_one_trace():
    traces = []
    nms = functools.partial(iou_guided_nms, iou_threshold=0.3, max_outputs=20)

    @jax.jit
    def batched(*case):
        traces.append(1)
        return jax.vmap(nms)(*case)

    for seeds in ((0, 1), (2, 3)):
        cases = [random_case(seed, 64) for seed in seeds]
        found = batched(*(np.stack(part) for part in zip(*cases, strict=True)))
        for i, case in enumerate(cases):
            single = jitted_nms(*case, iou_threshold=0.3, max_outputs=20)
            assert answer(jax.tree.map(lambda x, i=i: x[i], found)) == answer(single)
    assert len(traces) == 1
    assert answer(nms(*(jnp.asarray(part) for part in case))) == answer(single)
