import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.structures import BoxPredictions, RoISamples
from tests.models.roi_cases import K, heads_of, predictor_of, pyramid_and_boxes


def random_samples(*, seed=0, foreground=4, slots=8, invalid=1):
    """Two images: foreground first, then background, then padded rows."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (2, slots, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 40, (2, slots, 2))], axis=2).astype(np.float32)
    is_foreground = np.tile(np.arange(slots) < foreground, (2, 1))
    valid = np.tile(np.arange(slots) < slots - invalid, (2, 1))
    return RoISamples(
        boxes=boxes,
        gt_index=np.zeros((2, slots), np.int32),
        gt_boxes=boxes + rng.normal(0, 3, boxes.shape).astype(np.float32),
        gt_classes=np.where(is_foreground, rng.integers(0, K, (2, slots)), K).astype(np.int32),
        is_foreground=is_foreground,
        valid=valid,
    )


def random_predictions(*, seed=0, slots=8, num_boxes=K, log_vars=True):
    rng = np.random.default_rng(seed + 100)
    return BoxPredictions(
        class_logits=rng.normal(size=(2, slots, K + 1)).astype(np.float32),
        box_deltas=rng.normal(size=(2, slots, num_boxes, 4)).astype(np.float32),
        box_log_vars=rng.normal(size=(2, slots, num_boxes, 4)).astype(np.float32) if log_vars else None,
    )


def losses_of(predictor, predictions, samples):
    return jax.jit(lambda p, s: predictor.apply({}, p, s, method="losses"))(predictions, samples)


def losses_by_loops(predictions, samples, *, box_loss):
    """Sums over both images over their 14 valid RoIs."""
    box_term = alpha_term = cls = 0.0
    count = 0
    for i, r in np.ndindex(*samples.valid.shape):
        if not samples.valid[i, r]:
            continue
        count += 1
        logits = predictions.class_logits[i, r].astype(np.float64)
        cls += np.log(np.exp(logits).sum()) - logits[samples.gt_classes[i, r]]
        if not samples.is_foreground[i, r]:
            continue
        row = samples.gt_classes[i, r] if predictions.box_deltas.shape[2] > 1 else 0
        x1, y1, x2, y2 = samples.boxes[i, r].astype(np.float64)
        side = np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
        target = 10 * (samples.gt_boxes[i, r].astype(np.float64) - samples.boxes[i, r]) / side
        for edge in range(4):
            error = abs(predictions.box_deltas[i, r, row, edge] - target[edge])
            value = error**2 / 2 if error <= 1 else error - 0.5
            alpha = predictions.box_log_vars[i, r, row, edge] if box_loss == "kl" else 0.0
            box_term += np.exp(-alpha) * value
            alpha_term += alpha / 2
    return cls / count, box_term / count, alpha_term / count


@pytest.mark.parametrize("num_boxes", [1, K])
@pytest.mark.parametrize("box_loss", ["smooth_l1", "kl"])
def test_losses_against_the_loops(box_loss, num_boxes):
    samples = random_samples()
    predictions = random_predictions(num_boxes=num_boxes, log_vars=box_loss == "kl")
    found = losses_of(predictor_of(box_loss), predictions, samples)
    cls, box_term, alpha_term = losses_by_loops(predictions, samples, box_loss=box_loss)
    np.testing.assert_allclose(found.losses["loss_cls"], cls, rtol=1e-5)
    np.testing.assert_allclose(found.losses["loss_box_reg"], box_term + alpha_term, rtol=1e-5)
    if box_loss == "kl":
        # Each of 4 + 4 objects has four edges, each with alpha / 2 in the loss, over 14 RoIs.
        np.testing.assert_allclose(found.metrics["mean_log_var"], alpha_term * 14 * 2 / 32, rtol=1e-4)
    assert float(found.metrics["num_foreground"]) == 4


def test_the_normalizer_is_all_valid_rois():
    # One object among R RoIs whose x1 is off by 3 coded units, all else exact: smooth-L1 is 2.5 / R.
    for valid in (2, 5, 8):
        samples = random_samples(foreground=1, invalid=8 - valid)
        samples = samples.replace(gt_boxes=samples.boxes, valid=samples.valid & np.array([[True], [False]]))
        predictions = random_predictions(log_vars=False)
        predictions = predictions.replace(box_deltas=np.zeros_like(predictions.box_deltas))
        predictions.box_deltas[0, 0, samples.gt_classes[0, 0], 0] = 3.0
        found = losses_of(predictor_of("smooth_l1"), predictions, samples)
        np.testing.assert_allclose(found.losses["loss_box_reg"], 2.5 / valid, rtol=1e-5)


def test_the_weight_scales_the_box_loss_alone():
    samples, predictions = random_samples(), random_predictions()
    plain = losses_of(predictor_of("kl"), predictions, samples)
    doubled = losses_of(predictor_of("kl", box_loss_weight=2.0), predictions, samples)
    np.testing.assert_allclose(doubled.losses["loss_box_reg"], 2 * plain.losses["loss_box_reg"], rtol=1e-6)
    np.testing.assert_array_equal(doubled.losses["loss_cls"], plain.losses["loss_cls"])
    np.testing.assert_array_equal(doubled.metrics["mean_sigma"], plain.metrics["mean_sigma"])


def test_a_new_kl_head_starts_as_smooth_l1():
    pyramid, boxes = pyramid_and_boxes()
    heads, kl, baseline = heads_of("kl"), predictor_of("kl"), predictor_of("smooth_l1")
    variables = jax.jit(heads.init)(jax.random.key(0), pyramid, boxes)
    predictions = jax.jit(heads.apply)(variables, pyramid, boxes)
    assert float(jnp.abs(predictions.box_log_vars).max()) < 1e-2
    samples = random_samples(slots=5, foreground=3)
    found = losses_of(kl, predictions, samples).losses["loss_box_reg"]
    expected = losses_of(baseline, predictions, samples).losses["loss_box_reg"]
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    exact = predictions.replace(box_log_vars=jnp.zeros_like(predictions.box_log_vars))
    np.testing.assert_array_equal(losses_of(kl, exact, samples).losses["loss_box_reg"], expected)


@pytest.mark.parametrize("box_loss", ["smooth_l1", "kl"])
@pytest.mark.parametrize("invalid", [0, 8])
def test_without_objects_losses_and_gradients_are_finite(box_loss, invalid):
    samples = random_samples(foreground=0, invalid=invalid)
    samples.boxes[:, 3] = 0.0  # a RoI without size
    samples.gt_boxes[:, 2] = np.nan  # the background has no box
    predictions = random_predictions(log_vars=box_loss == "kl")

    def total(predictions):
        losses = losses_of(predictor_of(box_loss), predictions, samples).losses
        return sum(losses.values()), losses

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(predictions)
    assert float(losses["loss_box_reg"]) == 0.0
    assert (float(losses["loss_cls"]) > 0) == (invalid == 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert (np.asarray(gradients.box_deltas) == 0).all()


def test_only_the_matched_class_of_foreground_rows_is_regressed():
    samples, predictions = random_samples(), random_predictions()
    gradient = jax.grad(
        lambda deltas: losses_of(predictor_of("kl"), predictions.replace(box_deltas=deltas), samples).losses[
            "loss_box_reg"
        ]
    )(predictions.box_deltas)
    touched = (np.asarray(gradient) != 0).any(axis=3)
    expected = np.eye(K + 1, dtype=bool)[samples.gt_classes][:, :, :K] & samples.valid[:, :, None]
    np.testing.assert_array_equal(touched, expected)


def test_label_noise_reaches_the_loss_in_coded_units():
    # Means right, alpha 0: the Gaussian KL is log(1 / s) + s^2 / 2 - 1/2 for an edge with label noise s.
    samples = random_samples(foreground=1, invalid=0)
    samples = samples.replace(
        gt_boxes=samples.boxes,
        gt_box_stds=np.full_like(samples.boxes, 2.0),
        is_foreground=samples.is_foreground & np.array([[True], [False]]),
    )
    predictions = random_predictions()
    predictions = jax.tree.map(np.zeros_like, predictions)
    x1, y1, x2, y2 = samples.boxes[0, 0].astype(np.float64)
    sides = np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    for settings, stds in (
        ({"label_noise": "data"}, np.full(4, 2.0)),
        ({"label_noise": "pixels", "label_noise_value": 0.5}, np.full(4, 0.5)),
        ({"label_noise": "size", "label_noise_value": 0.05}, 0.05 * sides),
    ):
        coded = 10 * stds / sides
        expected = (-np.log(coded) + coded**2 / 2 - 0.5).sum() / 16
        predictor = predictor_of(BoxLoss(name="gaussian_kl", **settings))
        found = losses_of(predictor, predictions, samples).losses["loss_box_reg"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_sampled_loss_follows_its_key_and_a_ramp_its_step():
    samples, predictions = random_samples(), random_predictions()

    def box_loss(predictor, key, step):
        apply = jax.jit(
            lambda p, s, key, step: predictor.apply({}, p, s, key=key, step=step, method="losses")
        )
        found = apply(predictions, samples, jax.random.key(key), jnp.int32(step))
        return float(found.losses["loss_box_reg"])

    energy = predictor_of("energy_score")
    assert box_loss(energy, 0, 0) == box_loss(energy, 0, 9)
    assert box_loss(energy, 0, 0) != box_loss(energy, 1, 0)
    ramp = predictor_of(BoxLoss(name="gaussian_nll", ramp_steps=10))
    np.testing.assert_allclose(box_loss(ramp, 0, 0), box_loss(predictor_of("smooth_l1"), 0, 0), rtol=1e-6)
    np.testing.assert_allclose(box_loss(ramp, 0, 10), box_loss(predictor_of("gaussian_nll"), 0, 0), rtol=1e-6)
    assert box_loss(ramp, 0, 5) != box_loss(ramp, 0, 10)
