import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import initializers

from klbox_jax.train.optimizer import accumulate_gradients, make_optimizer
from klbox_jax.train.step import INIT_COMPILER_OPTIONS, TrainStep, create_state, stop_frozen
from tests.bits import assert_same_bits
from tests.thin import random_batch
from tests.train.toy import toy


def test_frozen_parameters_get_no_gradient():
    params = {"backbone": {"stem": jnp.ones(2), "stem2": jnp.ones(2)}, "head": jnp.ones(3)}

    def loss(params):
        return sum(
            jnp.square(leaf).sum() for leaf in jax.tree.leaves(stop_frozen(params, ("backbone/stem",)))
        )

    grads = jax.grad(loss)(params)
    np.testing.assert_array_equal(grads["backbone"]["stem"], [0.0, 0.0])
    # A prefix ends at a whole name: stem2 is not stem.
    np.testing.assert_array_equal(grads["backbone"]["stem2"], [2.0, 2.0])
    np.testing.assert_array_equal(grads["head"], [2.0, 2.0, 2.0])


def parts(*, accumulate_steps=1, skip_nonfinite=False):
    """A step of the toy, which fails on image 1 of a batch, its first state and two batches."""
    schedule = optax.constant_schedule(0.1)
    optimizer = make_optimizer(
        name="adamw", schedule=schedule, weight_decay=0.01, momentum=0.9, clip_norm=1.0, frozen=()
    )
    if accumulate_steps > 1:
        optimizer = accumulate_gradients(optimizer, accumulate_steps)
    model = toy(nan_on=(1,))
    batches = [random_batch(size=4, canvas=(8, 8), seed=seed) for seed in range(2)]
    batches = [batch.replace(image_id=batch.image_id + 2) for batch in batches]
    state = create_state(model, optimizer, batch=batches[0], seed=0)

    step = TrainStep(
        model=model, optimizer=optimizer, schedule=schedule, seed=0, skip_nonfinite=skip_nonfinite
    )
    return jax.jit(step), model, optimizer, state, batches


def test_initial_numbers_do_not_depend_on_how_hard_the_compiler_tries():
    drawn_by = (
        initializers.lecun_normal(),
        initializers.normal(1e-4),
        initializers.he_normal(),
        initializers.variance_scaling(2.0, "fan_out", "normal"),
        initializers.glorot_uniform(),
    )

    def draw(key):
        # As in a network, each array has a key of its own.
        keys = jax.random.split(key, len(drawn_by))
        return [draw_one(key, (3, 3, 17, 24)) for draw_one, key in zip(drawn_by, keys, strict=True)]

    key = jax.random.key(5)
    quickly = jax.jit(draw, compiler_options=INIT_COMPILER_OPTIONS)(key)
    # 3 is XLA's own level; the tests run at 0.
    assert_same_bits(quickly, jax.jit(draw, compiler_options={"xla_backend_optimization_level": 3})(key))
    assert all(float(jnp.std(values)) > 0 for values in quickly)


def test_two_batches_make_one_update_of_their_mean_gradient():
    step, model, _, state, batches = parts(accumulate_steps=2)

    def gradient(number):
        key = jax.random.fold_in(jax.random.key(0), number)

        def loss(params):
            outputs = model.apply({"params": params}, batches[number], key, method="train_forward")
            return sum(outputs.losses.values())

        return jax.grad(loss)(state.params)

    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradient(0), gradient(1))
    plain = parts()[2]
    updates, _ = plain.update(mean, plain.init(state.params), state.params)
    expected = optax.apply_updates(state.params, updates)

    half, _ = step(state, batches[0])
    assert_same_bits(half.params, state.params)
    whole, _ = step(half, batches[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole.params, expected)
    assert int(whole.step) == 2
    assert (
        max(
            np.abs(a - b).max()
            for a, b in zip(*map(jax.tree.leaves, (whole.params, state.params)), strict=True)
        )
        > 0.01
    )


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_skipped_step_changes_nothing_but_its_number(accumulate_steps):
    step, _, _, state, (good, other) = parts(accumulate_steps=accumulate_steps, skip_nonfinite=True)
    state, _ = step(state, good)
    bad = other.replace(image_id=np.arange(4, dtype=np.int32))
    after, scalars = step(state, bad)
    assert not np.isfinite(scalars["total_loss"])
    assert int(after.step) == int(state.step) + 1 == 2
    assert_same_bits((after.params, after.opt_state), (state.params, state.opt_state))
    # And the next one trains on.
    _, scalars = step(after, other)
    assert all(np.isfinite(value) for value in scalars.values())
    assert float(scalars["update_norm"]) > 0


def test_a_step_that_may_be_skipped_is_otherwise_the_same():
    step, _, _, state, (batch, _) = parts()
    skipping = parts(skip_nonfinite=True)[0]
    assert_same_bits(skipping(state, batch), step(state, batch))
