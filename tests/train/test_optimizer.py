import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from klbox_jax.train.checks import check_frozen
from klbox_jax.train.optimizer import (
    accumulate_gradients,
    build_optimizer,
    is_kernel,
    learning_rate_schedule,
    make_optimizer,
    peak_learning_rate,
)
from tests.thin import scenes_config


def schedule_of(**fields):
    arguments = {
        "peak": 0.02,
        "total_steps": 100,
        "warmup_steps": 10,
        "warmup_factor": 0.1,
        "decay_at": (0.75, 0.92),
        "decay_factor": 0.1,
    }
    return learning_rate_schedule(**(arguments | fields))


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.002),  # a tenth of 0.02
        (5, 0.011),  # half way from 0.1 to 1: 0.55
        (10, 0.02),
        (74, 0.02),
        (75, 0.002),
        (91, 0.002),
        (92, 0.0002),
        (1000, 0.0002),
    ],
)
def test_schedule_by_hand(step, rate):
    np.testing.assert_allclose(float(schedule_of()(step)), rate, rtol=1e-5)
    np.testing.assert_allclose(float(jax.jit(schedule_of())(jnp.int32(step))), rate, rtol=1e-5)


@pytest.mark.parametrize(("batch", "rate"), [(4, 0.005), (16, 0.02), (64, 0.08)])
def test_the_rate_is_per_sixteen_images(batch, rate):
    peak = peak_learning_rate(0.02, images=batch)
    np.testing.assert_allclose(float(schedule_of(peak=peak)(50)), rate, rtol=1e-6)


def test_without_warmup_and_decay_the_rate_is_constant():
    schedule = schedule_of(warmup_steps=0, decay_at=())
    assert {round(float(schedule(step)), 6) for step in (0, 1, 50, 99)} == {0.02}


def optimizer_of(*, rate=0.1, **fields):
    arguments = {"name": "sgd", "weight_decay": 0.0, "momentum": 0.0, "clip_norm": 0.0, "frozen": ()}
    return make_optimizer(schedule=optax.constant_schedule(rate), **(arguments | fields))


def updates_of(optimizer, params, *gradients):
    """Params after a step for each of the gradients."""
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params)


PARAMS = {
    "backbone": {"stem": {"kernel": jnp.array([[1.0]])}, "stem2": {"kernel": jnp.array([[1.0]])}},
    "head": {"kernel": jnp.array([[2.0, 2.0]]), "bias": jnp.array([2.0])},
}


def gradients_of(*, stem=0.0, stem2=0.0, kernel=(0.0, 0.0), bias=0.0):
    return {
        "backbone": {"stem": {"kernel": jnp.array([[stem]])}, "stem2": {"kernel": jnp.array([[stem2]])}},
        "head": {"kernel": jnp.array([kernel]), "bias": jnp.array([bias])},
    }


def test_the_whole_gradient_is_clipped():
    # Norm 13: clipped to 1, the step is 0.1 * (3, 4, 12) / 13.
    after = updates_of(optimizer_of(clip_norm=1.0), PARAMS, gradients_of(kernel=(3.0, 4.0), bias=12.0))
    np.testing.assert_allclose(after["head"]["kernel"], [[2 - 0.3 / 13, 2 - 0.4 / 13]], rtol=1e-6)
    np.testing.assert_allclose(after["head"]["bias"], [2 - 1.2 / 13], rtol=1e-6)
    # A small one is left as it is; and 0 clips nothing.
    for clip_norm, gradient in ((20.0, 12.0), (0.0, 1000.0)):
        after = updates_of(optimizer_of(clip_norm=clip_norm), PARAMS, gradients_of(bias=gradient))
        np.testing.assert_allclose(after["head"]["bias"], [2 - 0.1 * gradient], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_acts_on_kernels_alone(name):
    after = updates_of(optimizer_of(name=name, weight_decay=0.5), PARAMS, gradients_of())
    # 2 - 0.1 * 0.5 * 2
    np.testing.assert_allclose(after["head"]["kernel"], [[1.9, 1.9]], rtol=1e-6)
    np.testing.assert_array_equal(after["head"]["bias"], [2.0])


def test_arrays_of_two_axes_or_more_are_kernels():
    params = {
        "conv": jnp.zeros((3, 3, 4, 8)),
        "dense": jnp.zeros((4, 8)),
        "bias": jnp.zeros(8),
        "scale": jnp.zeros(8),
    }
    assert is_kernel(params) == {"conv": True, "dense": True, "bias": False, "scale": False}


def test_decay_enters_sgd_before_the_momentum():
    gradient = gradients_of(kernel=(1.0, 0.0))
    after = updates_of(optimizer_of(weight_decay=0.5, momentum=0.9), PARAMS, gradient, gradient)
    # First: velocity 1 + 0.5 * 2 = 2, kernel 2 - 0.2 = 1.8.
    # Second: 0.9 * 2 + 1 + 0.5 * 1.8 = 3.7, 1.8 - 0.37 = 1.43.
    np.testing.assert_allclose(after["head"]["kernel"][0, 0], 1.43, rtol=1e-6)


def test_adamw_moves_by_the_rate_at_first():
    after = updates_of(optimizer_of(name="adamw"), PARAMS, gradients_of(kernel=(3.0, -0.5), bias=1e-3))
    np.testing.assert_allclose(after["head"]["kernel"], [[1.9, 2.1]], rtol=1e-5)
    np.testing.assert_allclose(after["head"]["bias"], [1.9], rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_is_frozen_stays_bit_for_bit(name):
    optimizer = optimizer_of(
        name=name, weight_decay=0.5, momentum=0.9, clip_norm=1.0, frozen=("backbone/stem",)
    )
    gradient = gradients_of(stem=7.0, stem2=0.3, kernel=(0.1, 0.1), bias=0.1)
    after = updates_of(optimizer, PARAMS, gradient, gradient, gradient)
    np.testing.assert_array_equal(after["backbone"]["stem"]["kernel"], PARAMS["backbone"]["stem"]["kernel"])
    # The prefix is one of whole names.
    assert after["backbone"]["stem2"]["kernel"] != PARAMS["backbone"]["stem2"]["kernel"]


def test_what_is_frozen_has_no_part_in_the_norm():
    optimizer = optimizer_of(clip_norm=1.0, frozen=("backbone",))
    after = updates_of(optimizer, PARAMS, gradients_of(stem=1000.0, kernel=(3.0, 4.0)))
    # Norm 5 without the stem: 0.1 * (0.6, 0.8).
    np.testing.assert_allclose(after["head"]["kernel"], [[1.94, 1.92]], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_two_gradients_make_the_update_of_their_mean(name):
    fields = {
        "name": name,
        "weight_decay": 0.5,
        "momentum": 0.9,
        "clip_norm": 1.0,
        "frozen": ("backbone/stem",),
    }
    first = gradients_of(stem=7.0, stem2=0.3, kernel=(3.0, -1.0), bias=0.5)
    second = gradients_of(stem=-2.0, stem2=0.1, kernel=(1.0, 2.0), bias=-0.1)
    mean = gradients_of(stem=2.5, stem2=0.2, kernel=(2.0, 0.5), bias=0.2)
    optimizer = accumulate_gradients(optimizer_of(**fields), 2)
    expected = updates_of(optimizer_of(**fields), PARAMS, mean, first)
    found = updates_of(optimizer, PARAMS, first, second, first, first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    # The first of two changes nothing at all.
    jax.tree.map(np.testing.assert_array_equal, updates_of(optimizer, PARAMS, first), jax.device_get(PARAMS))


def test_the_mean_of_two_gradients_by_hand():
    optimizer = accumulate_gradients(optimizer_of(clip_norm=1.0, momentum=0.5), 2)
    gradients = [gradients_of(bias=bias) for bias in (6.0, -5.0, 0.1, 0.3)]
    # Means 0.5 and 0.2, neither of which is clipped, though 6 and -5 would be. Velocities 0.5, and 0.25 + 0.2.
    after = updates_of(optimizer, PARAMS, *gradients)
    np.testing.assert_allclose(after["head"]["bias"], [2 - 0.1 * 0.5 - 0.1 * 0.45], rtol=1e-6)


def test_the_rate_of_accumulated_gradients_counts_updates():
    rates = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    core = make_optimizer(
        name="sgd", schedule=rates, weight_decay=0.0, momentum=0.0, clip_norm=0.0, frozen=()
    )
    optimizer = accumulate_gradients(core, 3)
    # Six gradients of 0.5: an update at rate 1, and one at rate 0.1.
    after = updates_of(optimizer, PARAMS, *[gradients_of(bias=0.5)] * 6)
    np.testing.assert_allclose(after["head"]["bias"], [2 - 0.5 - 0.05], rtol=1e-6)


def test_one_gradient_to_an_update_is_the_plain_optimizer():
    config = scenes_config("loss=kl").optimizer
    fields = {name: config[name] for name in ("name", "weight_decay", "momentum", "clip_norm", "frozen")}
    plain = make_optimizer(schedule=optax.constant_schedule(0.1), **fields).init(PARAMS)
    built, _ = build_optimizer(config, batch_size=4, accumulate_steps=1, total_steps=6)
    assert jax.tree.structure(built.init(PARAMS)) == jax.tree.structure(plain)


def test_built_rates_count_updates_of_all_their_images():
    config = scenes_config("loss=kl").optimizer
    config.update(learning_rate=0.02, warmup_steps=2, warmup_factor=0.5, decay_at=(0.75,), decay_factor=0.1)
    optimizer, schedule = build_optimizer(config, batch_size=8, accumulate_steps=4, total_steps=16)
    # 32 images an update, so twice the rate; 4 updates of 4 steps: half of it, three quarters, all, and a tenth.
    rates = [float(schedule(step)) for step in range(16)]
    np.testing.assert_allclose(rates, np.repeat([0.02, 0.03, 0.04, 0.004], 4), rtol=1e-5)
    assert isinstance(optimizer.init(PARAMS), optax.MultiStepsState)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"config.optimizer.name = 'lion' is unknown; choose adamw or sgd"):
        optimizer_of(name="lion")


def test_a_prefix_that_freezes_nothing_is_refused():
    params = {"backbone": {"stem": {"kernel": 1}, "block_1": {"conv": {"kernel": 1}}}, "fpn": {"bias": 1}}
    check_frozen(("backbone", "backbone/stem", "backbone/block_1/conv", "fpn/bias"), params)
    check_frozen((), params)
    for prefix in ("backbone,fpn", "backbone/ste", "backbone/stem/", "Backbone", "stem"):
        with pytest.raises(
            ValueError, match=r"config\.optimizer\.frozen has .*, which is no prefix of a parameter"
        ):
            check_frozen((prefix,), params)
    with pytest.raises(ValueError, match=r"use such as backbone/stem"):
        check_frozen(("backbone/stm",), params)
