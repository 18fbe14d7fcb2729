import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.box_loss import BOX_LOSSES, BoxLoss
from klbox_jax.losses.box_regression import smooth_l1
from tests.references import losses as reference

PROBABILISTIC = [name for name in BOX_LOSSES if name not in ("smooth_l1", "l1")]
KEY = jax.random.key(0)
# (loss, sum of its absolute terms) of error, log-variance and label std; the energy score has a test of its own.
ORACLES = {
    "smooth_l1": lambda e, alpha, std: (reference.smooth_l1(e, 1),) * 2,
    "l1": lambda e, alpha, std: (abs(e), abs(e)),
    "kl": lambda e, alpha, std: reference.kl_loss(0.0, alpha, e)[:2],
    "kl_piecewise": lambda e, alpha, std: reference.kl_loss(0.0, alpha, e)[:2],
    "kl_note": lambda e, alpha, std: reference.kl_loss_note(e, alpha),
    "gaussian_nll": lambda e, alpha, std: reference.gaussian_nll(e, alpha),
    "laplace_nll": lambda e, alpha, std: reference.laplace_nll(e, alpha),
    "lasernet_kl": reference.lasernet_kl,
    "gaussian_kl": reference.gaussian_kl,
    "direct_moment_matching": lambda e, alpha, std: reference.direct_moment_matching(e, alpha, 1),
    "beta_nll": lambda e, alpha, std: reference.beta_nll(e, alpha, 0.5),
}


def random_inputs(seed, count=200, dtype=jnp.float32):
    """Offsets, log-variances, targets and label stds over six orders of magnitude."""
    rng = np.random.default_rng(seed)
    targets = rng.normal(0, 2, count)
    deltas = targets - rng.normal(0, 1, count) * 10.0 ** rng.uniform(-3, 3, count)
    log_vars, stds = rng.uniform(-6.5, 6.5, count), 10.0 ** rng.uniform(-3, 3, count)
    return tuple(jnp.asarray(x, dtype) for x in (deltas, log_vars, targets, stds))


def call(loss, deltas, log_vars, targets, stds, step=None):
    return loss(deltas, log_vars, targets, label_stds=stds, key=KEY, step=step)


def test_every_loss_has_an_oracle():
    assert set(ORACLES) | {"energy_score"} == set(BOX_LOSSES)


@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_formula(name):
    deltas, log_vars, targets, stds = random_inputs(0)
    found = call(BoxLoss(name=name), deltas, log_vars, targets, stds)
    assert found.dtype == jnp.float32
    rows = zip(*(np.asarray(x, np.float64) for x in (deltas, log_vars, targets, stds)), strict=True)
    expected, scale = np.array([ORACLES[name](t - d, alpha, std) for d, alpha, t, std in rows]).T
    assert (np.abs(found - expected) <= 1e-5 * scale).all()


@pytest.mark.parametrize("name", [n for n in BOX_LOSSES if n not in ("beta_nll", "direct_moment_matching")])
def test_gradients_equal_finite_differences(name):
    # The two left out stop a gradient on purpose: see their own tests.
    loss = BoxLoss(name=name, num_samples=5)
    with jax.enable_x64(True):
        arguments = random_inputs(1, dtype=jnp.float64)
        gradients = jax.grad(lambda d, a: call(loss, d, a, *arguments[2:]).sum(), argnums=(0, 1))(
            *arguments[:2]
        )
        for position, gradient in enumerate(gradients):
            step, values = 1e-6, []
            for shift in (step, -step):
                moved = [x + shift if i == position else x for i, x in enumerate(arguments)]
                values.append(call(loss, *moved))
            difference = (values[0] - values[1]) / (2 * step)
            scale = np.abs(gradient) + np.abs(values[0]) * 1e-4
            assert (np.abs(gradient - difference) <= 1e-5 * scale + 2e-6).all()


def best_alphas(name, e, std):
    """Closed forms of the best log-variance (log b^2 of a Laplace loss) for a fixed error."""
    size, b = abs(e), std / math.sqrt(2)
    return {
        "kl": math.log(e**2 if size <= 1 else 2 * size - 1),
        "kl_piecewise": math.log(e**2 if size <= 1 else 2 * size - 1),
        "kl_note": math.log(e**2 / 2 if size <= 1 else size - 0.5),
        "gaussian_nll": math.log(e**2),
        "laplace_nll": 2 * math.log(size),
        "lasernet_kl": 2 * math.log(b * math.exp(-size / b) + size),
        "gaussian_kl": math.log(std**2 + e**2),
        "direct_moment_matching": math.log(e**2),
        "beta_nll": math.log(e**2),
    }[name]


@pytest.mark.parametrize("name", [n for n in PROBABILISTIC if n != "energy_score"])
def test_best_variance_for_a_fixed_error(name):
    cases = [(0.2, 0.5), (-1.0, 0.05), (3.0, 4.0), (20.0, 0.3)]
    best = np.array([[best_alphas(name, error, std)] for error, std in cases])
    with jax.enable_x64(True):
        alphas = jnp.asarray(np.concatenate([best, np.tile(np.linspace(-6.9, 6.9, 47), (4, 1))], axis=1))
        targets, stds = (
            jnp.asarray(np.repeat([[case[i]] for case in cases], alphas.shape[1], axis=1)) for i in (0, 1)
        )
        gradients = jax.grad(lambda a: call(BoxLoss(name=name), 0 * a, a, targets, stds).sum())(alphas)
    alphas, gradients = np.asarray(alphas), np.asarray(gradients)
    # Flat at the closed form, downhill on its left, uphill on its right: the only minimum of the range.
    np.testing.assert_allclose(gradients[:, 0], 0, atol=1e-9)
    away = np.abs(alphas - best) > 0.05
    assert away.sum() > 4 * 44
    assert (gradients * np.sign(alphas - best) > 1e-6)[away].all()


def test_kl_and_note_best_variances_are_off_by_two():
    for error in (0.2, 1.0, 3.0, 20.0):
        ratio = best_alphas("kl", error, 1.0) - best_alphas("kl_note", error, 1.0)
        assert ratio == pytest.approx(math.log(2))


@pytest.mark.parametrize("ramp_steps", [0, 10])
@pytest.mark.parametrize("name", BOX_LOSSES)
def test_finite_for_any_input(name, ramp_steps):
    alphas = [-np.inf, -1e30, -100, -7, 0, 7, 100, 1e30, np.inf]
    errors = [0, 1e-30, 1e-3, 1, 1e6, -1e6]
    grids = np.meshgrid(errors, alphas, [1e-3, 1, 1e3])
    deltas, log_vars, stds = (jnp.asarray(grid.ravel(), jnp.float32) for grid in grids)
    loss = BoxLoss(name=name, num_samples=3, ramp_steps=ramp_steps)
    for step in (0, 5, 10) if ramp_steps else (None,):
        values, pull_back = jax.vjp(
            lambda d, a, t, step=step: call(loss, d, a, t, stds, step), deltas, log_vars, 0 * deltas
        )
        assert np.isfinite(values).all()
        assert all(np.isfinite(gradient).all() for gradient in pull_back(jnp.ones_like(values)))


@pytest.mark.parametrize("name", PROBABILISTIC)
def test_log_variance_outside_the_range_is_drawn_back(name):
    loss = BoxLoss(name=name, log_var_clamp=(-2.0, 3.0))
    # An error of 0.1 wants less variance than any of the range, one of 50 more.
    targets, alphas = jnp.array([0.1, 50.0, 50.0, 0.1]), jnp.array([9.0, 9.0, -9.0, -9.0])
    deltas, stds = jnp.zeros(4), jnp.full(4, 1e-3)
    values, pull_back = jax.vjp(lambda a: call(loss, deltas, a, targets, stds), alphas)
    slopes = pull_back(jnp.ones(4))[0]
    assert slopes[0] > 0
    assert slopes[2] < 0
    np.testing.assert_array_equal(slopes[jnp.array([1, 3])], 0)
    ends = jnp.array([3.0, 3.0, -2.0, -2.0])
    np.testing.assert_array_equal(values, call(loss, deltas, ends, targets, stds))


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_jit_equals_eager_in_one_trace(name):
    traces = []

    @jax.jit
    def compiled(*arguments):
        traces.append(None)
        return call(loss, *arguments)

    loss = BoxLoss(name=name, ramp_steps=100)
    *arrays, targets, stds = random_inputs(2)
    for step in (0, 30, 1000):
        arguments = (*arrays, targets, stds, jnp.int32(step))
        eager = call(loss, *arguments)
        np.testing.assert_allclose(compiled(*arguments), eager, rtol=2e-5, atol=2e-5 * 7)
    assert len(traces) == 1


def test_is_a_static_value():
    assert hash(BoxLoss(name="kl")) == hash(BoxLoss(name="kl", ramp_steps=0))
    assert BoxLoss(name="kl") != BoxLoss(name="kl", ramp_steps=1)
    loss = jax.jit(BoxLoss.__call__, static_argnums=0)
    assert loss(BoxLoss(name="l1"), jnp.zeros(4), None, jnp.ones(4)).sum() == 4


@pytest.mark.parametrize("name", PROBABILISTIC)
def test_ramp(name):
    arguments = random_inputs(3)
    plain, start = call(BoxLoss(name=name), *arguments), smooth_l1(arguments[0], arguments[2], beta=0.5)
    if name == "direct_moment_matching":
        plain = call(BoxLoss(name=name, smooth_l1_beta=0.5), *arguments)
    loss = BoxLoss(name=name, ramp_steps=1000, smooth_l1_beta=0.5)
    np.testing.assert_array_equal(call(loss, *arguments, step=0), start)
    # t = 1/2: (100^(1/2) - 1) / 99 = 1/11.
    middle = (10 * np.asarray(start, np.float64) + plain) / 11
    scale = np.abs(start) + np.abs(plain)
    assert (np.abs(call(loss, *arguments, step=500) - middle) <= 1e-5 * scale).all()
    for step in (1000, jnp.int32(10**9)):
        assert (np.abs(call(loss, *arguments, step=step) - plain) <= 1e-6 * scale).all()


@pytest.mark.parametrize("name", ["smooth_l1", "l1"])
def test_losses_without_variances(name):
    loss = BoxLoss(name=name, ramp_steps=10)
    assert not loss.has_variances
    assert not loss.needs_label_stds
    deltas, log_vars, targets, _ = random_inputs(4)
    # Neither a log-variance nor a step is needed: there is nothing to ramp to.
    np.testing.assert_array_equal(loss(deltas, None, targets), loss(deltas, log_vars, targets))
    with pytest.raises(ValueError, match="trains no variances"):
        loss.variance_of(log_vars)


def test_settings_reach_their_loss():
    deltas, log_vars, targets, _ = random_inputs(6, 4)
    half = BoxLoss(name="smooth_l1", smooth_l1_beta=0.5)(deltas, None, targets)
    np.testing.assert_array_equal(half, smooth_l1(deltas, targets, beta=0.5))
    plain = BoxLoss(name="beta_nll", beta_nll_beta=0.0)(deltas, log_vars, targets)
    np.testing.assert_array_equal(plain, BoxLoss(name="gaussian_nll")(deltas, log_vars, targets))
    few, many = (
        BoxLoss(name="energy_score", num_samples=n)(deltas, log_vars, targets, key=KEY) for n in (1, 9)
    )
    assert (few != many).all()


@pytest.mark.parametrize("name", PROBABILISTIC)
def test_variance_of(name):
    # log 4 is sigma^2 = 4, or b^2 = 4 and so a variance of 8; beyond the range its end.
    factor = 2 if name in ("laplace_nll", "lasernet_kl") else 1
    loss = BoxLoss(name=name, log_var_clamp=(-1.0, 2.0))
    variances = loss.variance_of(jnp.array([[math.log(4), 5.0, -np.inf]], jnp.bfloat16))
    np.testing.assert_allclose(
        variances, [[factor * 4, factor * math.exp(2), factor * math.exp(-1)]], rtol=5e-3
    )
    assert variances.dtype == jnp.float32


def test_variance_of_is_that_of_the_distribution_the_loss_fits():
    # Each likelihood's best alpha over many draws of variance 9 must stand for a variance of 9.
    rng, count = np.random.default_rng(0), 20_000
    draws = {"gaussian_nll": rng.normal(0, 3, count), "laplace_nll": rng.laplace(0, 3 / 2**0.5, count)}
    alphas = jnp.linspace(1.0, 3.0, 101)
    for name, errors in draws.items():
        loss = BoxLoss(name=name)
        grid = jnp.broadcast_to(jnp.asarray(errors, jnp.float32), (101, count))
        means = loss(grid, jnp.broadcast_to(alphas[:, None], grid.shape), 0 * grid).mean(axis=1)
        assert loss.variance_of(alphas)[means.argmin()] == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_shapes_are_not_broadcast(name):
    loss = BoxLoss(name=name)
    full, row = jnp.ones((3, 4)), jnp.ones((1, 4))
    with pytest.raises(ValueError, match="one shape"):
        call(loss, full, full, row, full)
    if loss.has_variances:
        with pytest.raises(ValueError, match="one shape"):
            call(loss, full, row, full, full)
    if loss.needs_label_stds:
        with pytest.raises(ValueError, match="one shape"):
            call(loss, full, full, full, row)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_low_precision_inputs_are_computed_in_float32(name):
    loss = BoxLoss(name=name, ramp_steps=2, num_samples=2)
    assert call(loss, *(jnp.full((2, 4), 0.3, jnp.bfloat16),) * 4, step=1).dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("kl", "log_vars"),
        ("gaussian_kl", "label_stds"),
        ("lasernet_kl", "label_stds"),
        ("energy_score", "key"),
        ("beta_nll", "step"),
    ],
)
def test_a_missing_argument_is_named(name, missing):
    given = {"log_vars": jnp.zeros(4), "label_stds": jnp.ones(4), "key": KEY, "step": 3} | {missing: None}
    with pytest.raises(ValueError, match=f"'{name}' needs {missing}"):
        BoxLoss(name=name, ramp_steps=10)(jnp.zeros(4), given.pop("log_vars"), jnp.zeros(4), **given)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"config\.model\.box_loss = 'l2' is unknown; .* smooth_l1, l1, kl,"):
        BoxLoss(name="l2")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("log_var_clamp", (7.0, -7.0), "the lower first"),
        ("smooth_l1_beta", -1.0, "0 or more"),
        ("beta_nll_beta", 1.5, "between 0 and 1"),
        ("num_samples", 0, "1 or more"),
        ("label_noise", "guess", "choose one of data, pixels, size"),
        ("label_noise_value", 0.0, "above 0"),
        ("label_noise_value", math.nan, "above 0"),
        ("ramp_steps", -1, "0 .no ramp. or more"),
    ],
)
def test_settings_without_meaning(field, value, reason):
    with pytest.raises(ValueError, match=rf"config\.model\.box_loss_settings\.{field} = .*{reason}"):
        BoxLoss(name="kl", **{field: value})


def test_a_share_of_the_side_is_below_one():
    with pytest.raises(ValueError, match=r"label_noise_value = 1\.0 must be below 1"):
        BoxLoss(name="gaussian_kl", label_noise="size")
    assert BoxLoss(name="gaussian_kl", label_noise="size", label_noise_value=0.02).needs_label_stds
