"""The mirrored image as a second look, through the whole eval step."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from klbox_jax.evaluation.eval_step import eval_step
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.init_or_restore import dummy_batch
from tests.references.mirroring import mirrored_image
from tests.thin import random_batch, thin_model

PLAIN = PostprocessSettings(
    suppression="soft_gaussian",
    voting="variance_score",
    sigma_t=0.05,
    score_by_std=4.0,
    score_threshold=0.0,
    pre_nms_topk=64,
    detections_per_image=20,
)
FLIP = dataclasses.replace(PLAIN, flip=True, pre_nms_topk=128)
SLOTS = 32


@pytest.fixture(scope="module")
def both_ways():
    """Detections of two images, and of the same two mirrored in the middle of their own width."""
    model = thin_model("loss=kl")
    first, key = dummy_batch((64, 96)), jax.random.key(0)
    params = jax.jit(lambda: model.init(key, first, key, method="train_forward")["params"])()
    step = jax.jit(functools.partial(eval_step, model=model, settings={"plain": PLAIN, "flip": FLIP}))
    batch = random_batch()
    mirrored = np.stack(
        [
            mirrored_image(image, width)
            for image, (_, width) in zip(batch.images, batch.image_size, strict=True)
        ]
    )
    assert (mirrored != batch.images).any()
    return batch, jax.device_get([step(params, each) for each in (batch, batch.replace(images=mirrored))])


def test_an_image_and_its_mirror_image_are_one_to_flip(both_ways):
    batch, (found, other) = both_ways
    for i, (_, width) in enumerate(batch.image_size):
        rows = found["flip"].valid[i]
        assert rows.sum() > 5
        np.testing.assert_array_equal(other["flip"].valid[i], rows)
        boxes = found["flip"].boxes[i][rows]
        expected = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        np.testing.assert_allclose(other["flip"].boxes[i][rows], expected, atol=2e-3)
        stds = found["flip"].box_stds[i][rows][:, [2, 1, 0, 3]]
        np.testing.assert_allclose(other["flip"].box_stds[i][rows], stds, rtol=1e-3)
        np.testing.assert_allclose(other["flip"].scores[i], found["flip"].scores[i], rtol=1e-4)
        np.testing.assert_array_equal(other["flip"].classes[i], found["flip"].classes[i])
        # What the one saw in the image itself, the other saw in its mirror.
        index = found["flip"].candidate_index[i][rows]
        assert (index < SLOTS).any()
        assert (index >= SLOTS).any()
        np.testing.assert_array_equal(
            other["flip"].candidate_index[i][rows], np.where(index < SLOTS, index + SLOTS, index - SLOTS)
        )


def test_without_flip_there_is_one_look(both_ways):
    batch, (found, other) = both_ways
    assert (found["plain"].candidate_index < SLOTS).all()
    width = batch.image_size[0, 1]
    boxes = found["plain"].boxes[0]
    mirrored = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    assert np.abs(other["plain"].boxes[0] - mirrored).max() > 0.1
