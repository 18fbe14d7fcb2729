"""Inputs that KL Loss might not survive: ten times the rate, labels far outside the image, and broken images."""

import functools

import jax
import numpy as np
import pytest

from klbox_jax import distributed
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.optimizer import build_optimizer
from klbox_jax.train.step import compile_train_step, create_state
from tests.thin import random_batch, scenes_config, thin_model

CANVAS = (64, 96)


@functools.cache
def parts(dtype):
    """The shipped training of scenes at ten times its rate, with no warm-up, over a thin network."""
    config = scenes_config("loss=kl").optimizer
    config.learning_rate *= 10
    config.warmup_steps = 0
    optimizer, schedule = build_optimizer(config, batch_size=4, accumulate_steps=1, total_steps=100)
    model = thin_model("loss=kl", **{"model.dtype": dtype})
    step = compile_train_step(
        distributed.make_mesh(), model=model, optimizer=optimizer, schedule=schedule, seed=0
    )
    if dtype == "bfloat16":  # whose parameters are float32 too
        return step, parts("float32")[1]
    return step, jax.device_get(create_state(model, optimizer, batch=dummy_batch(CANVAS), seed=0))


def clean(batch):
    return batch


def far_labels(batch):
    """A box that begins in the image and ends a million pixels away, and one that lies there."""
    boxes = batch.gt.boxes.copy()
    boxes[0, 0] = [10, 10, 1e6, 1e6]
    boxes[1, 0] = [1e6, 1e6, 2e6, 2e6]
    boxes[2, 0] = [-1e6, -1e6, 1e6, 1e6]
    return batch.replace(gt=batch.gt.replace(boxes=boxes))


def filled(value):
    def change(batch):
        images = batch.images.copy()
        images[1] = value
        return batch.replace(images=images)

    change.__name__ = f"all_{value}"
    return change


def noise(batch):
    images = batch.images.copy()
    images[1] = np.random.default_rng(7).integers(0, 256, images[1].shape)
    return batch.replace(images=images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change", [clean, far_labels, filled(0), filled(255), noise], ids=lambda f: f.__name__
)
def test_training_survives(dtype, change):
    mesh = distributed.make_mesh()
    step, start = parts(dtype)
    state = jax.device_put(start, distributed.replicated(mesh))
    # Bad batches from the first step on, and then sound ones.
    for number in range(6):
        batch = random_batch(size=4, canvas=CANVAS, seed=number)
        state, scalars = step(state, distributed.put_batch(change(batch) if number < 3 else batch, mesh))
        broken = [name for name, value in jax.device_get(scalars).items() if not np.isfinite(value)]
        assert not broken, f"step {number + 1}"
    state = jax.device_get(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, start.params)), strict=True)
    ]
    assert max(moved) > 1e-3
