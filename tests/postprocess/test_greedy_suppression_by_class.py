import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.greedy_suppression import greedy_suppression
from klbox_jax.postprocess.greedy_suppression_by_class import greedy_suppression_by_class
from klbox_jax.postprocess.soft_nms import SoftNMS

COUNT = 120
DECAY = SoftNMS(sigma=0.3, min_score=0.2)


def image(seed, num_classes):
    """Whole coordinates and few scores: duplicates, ties, and boxes that are not valid."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 60, (COUNT, 2))
    boxes = np.concatenate([corner, corner + rng.integers(8, 40, (COUNT, 2))], axis=1)
    scores = rng.integers(20, 64, COUNT) / 64
    return (
        boxes.astype(np.float32),
        scores.astype(np.float32),
        rng.integers(0, num_classes, COUNT).astype(np.int32),
        rng.random(COUNT) < 0.8,
    )


def pick(suppression, boxes, scores, classes, valid, *, max_outputs):
    candidates = Candidates(boxes=boxes, scores=scores, classes=classes, valid=valid)
    return suppression(candidates, DECAY, max_outputs=max_outputs)


@functools.partial(jax.jit, static_argnames="max_outputs")
def both(boxes, scores, classes, valid, *, max_outputs):
    return tuple(
        jax.vmap(functools.partial(pick, suppression, max_outputs=max_outputs))(boxes, scores, classes, valid)
        for suppression in (greedy_suppression_by_class, greedy_suppression)
    )


@pytest.fixture(params=["cpu", "default"])
def form(request, monkeypatch):
    """Traces the form of CPUs, and that of accelerators."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms[request.param](*arrays))
    both.clear_cache()
    yield request.param
    both.clear_cache()


@pytest.mark.parametrize("max_outputs", [7, COUNT + 5])
def test_equals_the_plain_loop(max_outputs, form):
    # One class, several, and more than there are queues; 128 apart, they share one.
    images = [image(seed, num_classes) for seed, num_classes in enumerate([1, 1, 3, 10, 80, 1000])]
    images += [(boxes, scores, classes * 128, valid) for boxes, scores, classes, valid in images[2:4]]
    stacked = [jnp.stack(arrays) for arrays in zip(*images, strict=True)]
    with jax.enable_x64(True):
        ours, plain = both(
            *(jnp.asarray(x, "f8" if x.dtype == np.float32 else x.dtype) for x in stacked),
            max_outputs=max_outputs,
        )
    np.testing.assert_array_equal(ours.valid, plain.valid)
    np.testing.assert_array_equal(ours.indices, plain.indices)
    np.testing.assert_array_equal(ours.num_picks_alive, plain.num_picks_alive)
    np.testing.assert_allclose(ours.scores, plain.scores, rtol=1e-12)
    assert ours.valid.all() == (max_outputs == 7)


def test_what_is_not_valid_may_hold_anything():
    boxes, scores, classes, valid = image(0, 3)
    garbage = np.where(valid[:, None], boxes, np.nan), np.where(valid, scores, np.inf)
    ours, plain = both(
        jnp.stack([boxes, garbage[0]]),
        jnp.stack([scores, garbage[1]]),
        jnp.stack([classes] * 2),
        jnp.stack([valid] * 2),
        max_outputs=7,
    )
    np.testing.assert_array_equal(ours.indices[1], plain.indices[0])
    np.testing.assert_array_equal(ours.scores[1], ours.scores[0])


def test_one_image_under_several_scores():
    """What the images of a batch share need not be batched."""
    boxes, _, classes, valid = (jnp.asarray(array) for array in image(0, 3))
    scores = jnp.stack([image(seed, 3)[1] for seed in range(3)])
    by_class = functools.partial(pick, greedy_suppression_by_class, max_outputs=9)
    found = jax.jit(jax.vmap(by_class, in_axes=(None, 0, None, None)))(boxes, scores, classes, valid)
    for row, its_scores in enumerate(scores):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row], found)
        plain = pick(greedy_suppression, boxes, its_scores, classes, valid, max_outputs=9)
        np.testing.assert_array_equal(alone.indices, plain.indices)
        np.testing.assert_array_equal(alone.num_picks_alive, plain.num_picks_alive)
        np.testing.assert_allclose(alone.scores, plain.scores, rtol=1e-5)


def test_gradients_are_those_of_the_plain_loop():
    boxes, scores, classes, valid = (jnp.asarray(array) for array in image(1, 3))

    def slopes(suppression):
        def total(boxes, scores):
            found = pick(suppression, boxes, scores, classes, valid, max_outputs=20)
            return jnp.sum(jnp.square(found.scores))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(boxes, scores)

    for ours, plain in zip(slopes(greedy_suppression_by_class), slopes(greedy_suppression), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
        assert np.asarray(ours).any()
