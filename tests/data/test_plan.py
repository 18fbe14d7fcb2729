import collections

import numpy as np
import pytest

from klbox_jax.data.plan import EvalPlan, Shard, TrainPlan

# Canvas 1 has no image, canvas 3 fewer than a batch.
CANVASES = np.random.default_rng(0).permutation([0] * 21 + [2] * 16 + [3] * 3)


def _epoch(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return [plan.step(step) for step in range(first, first + plan.steps_per_epoch)]


def test_steps_per_epoch_by_hand():
    # ceil(21 / 8) + ceil(16 / 8) + ceil(3 / 8) = 3 + 2 + 1
    assert TrainPlan(CANVASES, batch_size=8, seed=0).steps_per_epoch == 6


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_every_epoch_covers_all_and_no_batch_mixes_canvases(batch_size):
    plan = TrainPlan(CANVASES, batch_size=batch_size, seed=3)
    for epoch in range(3):
        steps = _epoch(plan, epoch)
        for step in steps:
            assert step.epoch == epoch
            assert step.indices.shape == (batch_size,)
            assert (CANVASES[step.indices] == step.canvas).all()
            assert step.valid.all()
        assert set(np.concatenate([step.indices for step in steps])) == set(range(len(CANVASES)))
        assert {step.canvas for step in steps} == {0, 2, 3}


def test_repeats_are_as_few_and_as_spread_as_possible():
    for seed in range(20):
        plan = TrainPlan(CANVASES, batch_size=8, seed=seed)
        seen = collections.Counter()
        for step in _epoch(plan, 0):
            seen.update(step.indices.tolist())
            if step.canvas != 3:
                assert len(set(step.indices.tolist())) == 8
        for canvas in (0, 2, 3):
            times = [seen[image] for image in np.flatnonzero(canvas == CANVASES)]
            assert max(times) - min(times) <= 1


def test_random_access_is_pure():
    plan = TrainPlan(CANVASES, batch_size=8, seed=5)
    forwards = [plan.step(step) for step in range(30)]
    for step in reversed(range(30)):
        again = TrainPlan(CANVASES.tolist(), batch_size=8, seed=5).step(step)
        np.testing.assert_array_equal(again.indices, forwards[step].indices)
        np.testing.assert_array_equal(plan.step(step).indices, forwards[step].indices)
        assert again.canvas == forwards[step].canvas
        assert again.rng(3).random() == forwards[step].rng(3).random()


def test_epochs_seeds_and_slots_differ():
    plan = TrainPlan(CANVASES, batch_size=8, seed=0)
    first, second = (np.concatenate([s.indices for s in _epoch(plan, epoch)]) for epoch in (0, 1))
    other = np.concatenate([s.indices for s in _epoch(TrainPlan(CANVASES, batch_size=8, seed=1), 0)])
    assert (first != second).any()
    assert (first != other).any()
    draws = {plan.step(step).rng(slot).random() for step in range(10) for slot in range(8)}
    assert len(draws) == 80
    draws.add(TrainPlan(CANVASES, batch_size=8, seed=1).step(0).rng(0).random())
    assert len(draws) == 81


def test_batches_of_all_canvases_are_shuffled_together():
    plan = TrainPlan([0] * 80 + [1] * 80, batch_size=8, seed=0)
    order = [step.canvas for step in _epoch(plan, 0)]
    assert sorted(order) == [0] * 10 + [1] * 10
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_shuffling_is_uniform_over_first_places():
    # 400 epochs of 8 images: each is expected first 50 times, standard deviation 6.6.
    plan = TrainPlan([0] * 8, batch_size=4, seed=0)
    firsts = np.bincount([plan.step(2 * epoch).indices[0] for epoch in range(400)], minlength=8)
    assert firsts.min() > 20
    assert firsts.max() < 80


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_slices_make_up_the_batch(process_count):
    slices = [Shard(i, process_count).slots(8) for i in range(process_count)]
    assert np.concatenate([np.arange(8)[part] for part in slices]).tolist() == list(range(8))


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match=r"batch of 8 images .* 3 processes.*multiple of 3"):
        Shard(0, 3).slots(8)
    with pytest.raises(ValueError, match="process_index must be in 0 to 1"):
        Shard(2, 2).slots(8)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_evaluation_sees_every_image_exactly_once_in_order(batch_size):
    plan = EvalPlan(CANVASES, batch_size=batch_size)
    steps = [plan.step(step) for step in range(plan.num_steps)]
    seen = np.concatenate([step.indices[step.valid] for step in steps])
    np.testing.assert_array_equal(seen, np.argsort(CANVASES, kind="stable"))
    for step in steps:
        assert step.indices.shape == (batch_size,)
        assert (CANVASES[step.indices] == step.canvas).all()
        assert step.valid[0]
        # What fills a batch comes last.
        assert (np.diff(step.valid.astype(int)) <= 0).all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="batch size must be positive"):
        TrainPlan([0], batch_size=0, seed=0)
    with pytest.raises(ValueError, match="no images"):
        EvalPlan([], batch_size=2)
    with pytest.raises(ValueError, match="seed must not be negative"):
        TrainPlan([0], batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="Steps count from 0"):
        TrainPlan([0], batch_size=1, seed=0).step(-1)
    with pytest.raises(ValueError, match="steps 0 to 0"):
        EvalPlan([0], batch_size=1).step(1)
