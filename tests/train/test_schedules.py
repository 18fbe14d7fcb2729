"""Warm-up, ramp and decay in steps or as shares of the training, and what never ends or ends at once."""

import importlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models.build import build_model
from klbox_jax.train.optimizer import build_optimizer, learning_rate_schedule
from klbox_jax.train.schedules import find_unfit_lengths, to_steps, with_ramp_in_steps
from tests.golden.make_configs import VARIANTS
from tests.thin import scenes_config


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (0.0, 0),
        (7, 7),
        (1, 1),
        (1.0, 200),
        (0.5, 100),
        (0.05, 10),
        (0.0123, 2),
        (300, 300),
        (300.0, 300),
    ],
)
def test_steps_and_shares(value, steps):
    found = to_steps(value, 200, field="optimizer.warmup_steps")
    assert (found, type(found)) == (steps, int)


@pytest.mark.parametrize("value", [-1, -0.1, 1.5, True])
def test_what_is_no_length(value):
    with pytest.raises(ValueError, match=r"config\.optimizer\.warmup_steps has .*a share of the training"):
        to_steps(value, 200, field="optimizer.warmup_steps")


def schedule_of(**fields):
    arguments = {
        "total_steps": 100,
        "warmup_steps": 0,
        "warmup_factor": 0.1,
        "decay_at": (),
        "decay_factor": 0.1,
    }
    schedule = learning_rate_schedule(1.0, **(arguments | fields))
    return [float(schedule(jnp.asarray(step))) for step in range(100)]


def test_decay_by_steps_is_decay_by_shares():
    by_shares, by_steps = schedule_of(decay_at=(0.6, 0.9)), schedule_of(decay_at=(60, 90))
    assert by_shares == by_steps
    np.testing.assert_allclose(
        [by_steps[step] for step in (0, 59, 60, 89, 90)], [1, 1, 0.1, 0.1, 0.01], rtol=1e-6
    )


def test_a_warm_up_by_share_counts_updates():
    """With two batches to an update, a tenth of 200 batches are ten updates."""
    rates = []
    for warmup in (0.1, 10):
        config = scenes_config(**{"optimizer.decay_at": ()}).optimizer.copy_and_resolve_references().unlock()
        del config["warmup_steps"]
        config["warmup_steps"] = warmup
        _, schedule = build_optimizer(config, batch_size=8, accumulate_steps=2, total_steps=200)
        rates.append([float(schedule(jnp.asarray(step))) for step in (0, 10, 19, 20, 30)])
    assert rates[0] == rates[1]
    assert rates[0][3] == rates[0][4] > rates[0][2]


def model_config(ramp):
    config = scenes_config("loss=kl").model.copy_and_resolve_references().unlock()
    config.box_loss_settings = dict(config.box_loss_settings) | {"ramp_steps": ramp}
    return config


def test_a_ramp_by_share_has_steps_in_a_training():
    config = model_config(0.75)
    model = build_model(with_ramp_in_steps(config, 912), num_classes=3)
    assert model.roi_heads.box_loss.ramp_steps == 684
    assert config.box_loss_settings.ramp_steps == 0.75
    same = model_config(684)
    assert with_ramp_in_steps(same, 912) is same
    assert build_model(same, num_classes=3) == model
    # A share alone is no length: who trains without `Job` is told.
    loss = build_model(config, num_classes=3).roi_heads.box_loss
    one = jnp.ones((1, 4))
    with pytest.raises(
        ValueError, match=r"ramp_steps = 0\.75 is a share of the training; give the loss a number"
    ):
        loss(one, one, one, step=0)


def unfit(total_steps, *, has_variances=True, **fields):
    config = scenes_config().copy_and_resolve_references().unlock()
    config.optimizer = dict(config.optimizer) | {"warmup_steps": 0, "decay_at": ()}
    for name, value in fields.items():
        group = config.model.box_loss_settings if name == "ramp_steps" else config.optimizer
        with config.ignore_type():
            group[name] = value
    return find_unfit_lengths(config, total_steps=total_steps, has_variances=has_variances)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"warmup_steps": 100},
            r"the warm-up takes 100 steps and does not end within the 100 steps .*optimizer\.warmup",
        ),
        (
            {"warmup_steps": 0.001},
            r"the warm-up ends after 0 of 100 steps, almost at once; set config\.optimizer\.warmup",
        ),
        (
            {"ramp_steps": 684},
            r"the ramp of the box loss takes 684 steps and does not end .*box_loss_settings\.ramp",
        ),
        ({"decay_at": (0.5, 500)}, r"decay_at has step 500, but the training ends at step 100"),
    ],
)
def test_what_never_ends_or_ends_at_once_is_said(fields, message):
    (found,) = unfit(100, **fields)
    assert re.search(message, found)
    assert "\n" not in found


def test_a_ramp_of_a_long_training_ends_at_once():
    assert (
        "the ramp of the box loss ends after 684 of 100000 steps, almost at once"
        in unfit(100_000, ramp_steps=684)[0]
    )


def test_what_fits_is_not_mentioned():
    assert unfit(100, warmup_steps=5, ramp_steps=75, decay_at=(0.5, 90)) == []
    assert unfit(100, warmup_steps=0.05, ramp_steps=0.75) == []
    assert unfit(100, ramp_steps=684, has_variances=False) == []


@pytest.mark.parametrize("family", VARIANTS)
def test_the_families_fit_their_own_training(family):
    """Those whose length depends on the data set are taken with 5,000 steps."""
    config = importlib.import_module(f"configs.{family}").get_config()
    steps = config.train.num_steps or 5000
    assert find_unfit_lengths(config, total_steps=steps, has_variances=True) == []
