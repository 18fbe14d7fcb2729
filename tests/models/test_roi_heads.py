import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.models.box_head import BoxHead
from klbox_jax.models.iou_head import IoUHead
from klbox_jax.models.roi_heads import RoIHeads, sample_rois
from klbox_jax.models.roi_pooler import RoIPooler
from klbox_jax.structures import BoxPredictions, GroundTruth, Proposals, RoISamples
from tests.thin import num_params

K = 3


def proposals_of(boxes, valid=None):
    boxes = np.asarray(boxes, np.float32)
    return Proposals(
        boxes=boxes,
        objectness_logits=np.zeros(len(boxes), np.float32),
        valid=np.ones(len(boxes), bool) if valid is None else np.asarray(valid),
    )


def ground_truth(boxes, classes, *, is_crowd=None, valid=None, box_stds=None):
    boxes = np.asarray(boxes, np.float32)
    return GroundTruth(
        boxes=boxes,
        classes=np.asarray(classes, np.int32),
        is_crowd=np.zeros(len(boxes), bool) if is_crowd is None else np.asarray(is_crowd),
        valid=np.ones(len(boxes), bool) if valid is None else np.asarray(valid),
        box_stds=box_stds,
    )


def sample(proposals, gt, *, num_samples=8, positive_fraction=0.5, seed=0):
    return jax.jit(
        lambda proposals, gt, key: sample_rois(
            proposals,
            gt,
            key,
            num_classes=K,
            iou_threshold=0.5,
            num_samples=num_samples,
            positive_fraction=positive_fraction,
        )
    )(proposals, gt, jax.random.key(seed))


def rows(samples, mask):
    return {tuple(box) for box in np.asarray(samples.boxes)[np.asarray(mask)].tolist()}


def test_sampling_by_hand():
    gt = ground_truth(
        [[0, 0, 10, 10], [20, 20, 40, 40], [100, 100, 200, 200], [60, 60, 70, 70]],
        [2, 0, 1, 1],
        is_crowd=[False, False, True, False],
        valid=[True, True, True, False],
        box_stds=np.arange(16, dtype=np.float32).reshape(4, 4),
    )
    proposals = proposals_of(
        [
            [0, 0, 10, 9],  # IoU 0.9 with object 0
            [20, 20, 40, 31],  # 0.55 with object 1
            [20, 20, 40, 29],  # 0.45: background
            [120, 120, 130, 130],  # inside the crowd: ignored
            [60, 60, 70, 70],  # on the padded slot: background
            [0, 0, 10, 10],  # not a proposal
        ],
        valid=[True] * 5 + [False],
    )
    samples = sample(proposals, gt, num_samples=10)
    foreground, valid = np.asarray(samples.is_foreground), np.asarray(samples.valid)
    # The two objects stand beside the proposals; neither the crowd nor the padded slot does.
    assert rows(samples, foreground) == {(0, 0, 10, 9), (20, 20, 40, 31), (0, 0, 10, 10), (20, 20, 40, 40)}
    assert foreground.sum() == 4
    assert rows(samples, valid & ~foreground) == {(20, 20, 40, 29), (60, 60, 70, 70)}
    assert valid.sum() == 6
    for row in np.flatnonzero(foreground):
        of_second = samples.boxes[row, 0] >= 20
        assert int(samples.gt_classes[row]) == (0 if of_second else 2)
        assert int(samples.gt_index[row]) == (1 if of_second else 0)
        np.testing.assert_array_equal(samples.gt_boxes[row], gt.boxes[int(of_second)])
        np.testing.assert_array_equal(samples.gt_box_stds[row], gt.box_stds[int(of_second)])
    np.testing.assert_array_equal(np.asarray(samples.gt_classes)[~foreground], K)


def test_an_image_of_crowds_and_padding_has_no_foreground():
    gt = ground_truth([[0, 0, 50, 50], [0, 0, 50, 50]], [1, 1], is_crowd=[True, False], valid=[True, False])
    samples = sample(proposals_of([[0, 0, 50, 50], [5, 5, 30, 30], [60, 60, 90, 90]]), gt)
    assert not samples.is_foreground.any()
    assert rows(samples, samples.valid) == {(60, 60, 90, 90)}
    np.testing.assert_array_equal(samples.gt_classes, K)


def test_empty_ground_truth_gives_background_alone():
    gt = ground_truth([[0, 0, 1, 1]] * 2, [0, 0], valid=[False, False])
    samples = sample(proposals_of([[0, 0, 50, 50], [0, 0, 1, 1], [5, 5, 30, 30]]), gt)
    assert int(samples.valid.sum()) == 3
    assert not samples.is_foreground.any()
    np.testing.assert_array_equal(samples.gt_classes, K)


def test_the_share_of_foreground_is_bounded():
    boxes = [[0, 0, 20, 20 - 0.1 * i] for i in range(20)] + [[50, 50, 60, 60 + i] for i in range(20)]
    samples = sample(
        proposals_of(boxes), ground_truth([[0, 0, 20, 20]], [1]), num_samples=16, positive_fraction=0.25
    )
    assert int(samples.is_foreground.sum()) == 4
    assert int(samples.valid.sum()) == 16


def is_predictions(x):
    return isinstance(x, BoxPredictions)


def heads_of(box_loss="kl", **fields):
    arguments = {
        "box_loss": box_loss if isinstance(box_loss, BoxLoss) else BoxLoss(name=box_loss),
        "box_pooler": RoIPooler(levels=(3, 4), resolution=3),
        "box_head": BoxHead(16),
        "class_agnostic": False,
    }
    return RoIHeads(num_classes=K, **(arguments | fields))


def pyramid_and_boxes():
    rng = np.random.default_rng(0)
    pyramid = {
        "p3": jnp.asarray(rng.normal(size=(2, 12, 10, 4)), jnp.float32),
        "p4": jnp.asarray(rng.normal(size=(2, 6, 5, 4)), jnp.float32),
    }
    corners = rng.uniform(0, 40, (2, 5, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 40, (2, 5, 2))], axis=2)
    return pyramid, jnp.asarray(boxes, jnp.float32)


@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize("box_loss", ["smooth_l1", "kl"])
def test_shapes_and_parameters(box_loss, class_agnostic):
    heads = heads_of(box_loss, class_agnostic=class_agnostic)
    pyramid, boxes = pyramid_and_boxes()
    leaves, variables = jax.eval_shape(
        lambda: jax.tree.map(
            jax.tree.leaves, heads.init_with_output(jax.random.key(0), pyramid, boxes), is_leaf=is_predictions
        )
    )
    num_boxes = 1 if class_agnostic else K
    branches = 1 if box_loss == "smooth_l1" else 2
    # Logits, deltas and, with a probabilistic loss, log variances.
    assert [leaf.shape for leaf in leaves] == [(2, 5, K + 1)] + branches * [(2, 5, num_boxes, 4)]
    # 3 x 3 bins of 4 channels to 16, 16 to 16; classes with the background; 4 numbers a box and branch.
    assert num_params(variables) == (
        (36 * 16 + 16)
        + (16 * 16 + 16)
        + (16 * (K + 1) + K + 1)
        + branches * (16 * 4 * num_boxes + 4 * num_boxes)
    )


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


def losses_of(heads, predictions, samples):
    return jax.jit(lambda p, s: heads.apply({}, p, s, method="losses"))(predictions, samples)


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
    found = losses_of(heads_of(box_loss), predictions, samples)
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
        found = losses_of(heads_of("smooth_l1"), predictions, samples)
        np.testing.assert_allclose(found.losses["loss_box_reg"], 2.5 / valid, rtol=1e-5)


def test_the_weight_scales_the_box_loss_alone():
    samples, predictions = random_samples(), random_predictions()
    plain = losses_of(heads_of("kl"), predictions, samples)
    doubled = losses_of(heads_of("kl", box_loss_weight=2.0), predictions, samples)
    np.testing.assert_allclose(doubled.losses["loss_box_reg"], 2 * plain.losses["loss_box_reg"], rtol=1e-6)
    np.testing.assert_array_equal(doubled.losses["loss_cls"], plain.losses["loss_cls"])
    np.testing.assert_array_equal(doubled.metrics["mean_sigma"], plain.metrics["mean_sigma"])


def test_a_new_kl_head_starts_as_smooth_l1():
    pyramid, boxes = pyramid_and_boxes()
    kl, baseline = heads_of("kl"), heads_of("smooth_l1")
    variables = jax.jit(kl.init)(jax.random.key(0), pyramid, boxes)
    predictions = jax.jit(kl.apply)(variables, pyramid, boxes)
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
        losses = losses_of(heads_of(box_loss), predictions, samples).losses
        return sum(losses.values()), losses

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(predictions)
    assert float(losses["loss_box_reg"]) == 0.0
    assert (float(losses["loss_cls"]) > 0) == (invalid == 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert (np.asarray(gradients.box_deltas) == 0).all()


def test_only_the_matched_class_of_foreground_rows_is_regressed():
    samples, predictions = random_samples(), random_predictions()
    gradient = jax.grad(
        lambda deltas: losses_of(heads_of("kl"), predictions.replace(box_deltas=deltas), samples).losses[
            "loss_box_reg"
        ]
    )(predictions.box_deltas)
    touched = (np.asarray(gradient) != 0).any(axis=3)
    expected = np.eye(K + 1, dtype=bool)[samples.gt_classes][:, :, :K] & samples.valid[:, :, None]
    np.testing.assert_array_equal(touched, expected)


def test_rois_of_an_image_that_only_fills_the_batch_are_not_valid():
    proposals = jax.tree.map(lambda x: np.stack([x, x]), proposals_of([[0, 0, 10, 10], [50, 50, 60, 60]]))
    gt = jax.tree.map(lambda x: np.stack([x, x]), ground_truth([[0, 0, 10, 10]], [1]))
    keys = jax.random.split(jax.random.key(0), 2)
    samples = jax.jit(lambda *a: heads_of(batch_size_per_image=4).apply({}, *a, method="sample"))(
        proposals, gt, np.array([True, False]), keys
    )
    assert samples.valid.any(axis=1).tolist() == [True, False]


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
        heads = heads_of(BoxLoss(name="gaussian_kl", **settings))
        found = losses_of(heads, predictions, samples).losses["loss_box_reg"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_sampled_loss_follows_its_key_and_a_ramp_its_step():
    samples, predictions = random_samples(), random_predictions()

    def box_loss(heads, key, step):
        apply = jax.jit(lambda p, s, key, step: heads.apply({}, p, s, key=key, step=step, method="losses"))
        found = apply(predictions, samples, jax.random.key(key), jnp.int32(step))
        return float(found.losses["loss_box_reg"])

    energy = heads_of("energy_score")
    assert box_loss(energy, 0, 0) == box_loss(energy, 0, 9)
    assert box_loss(energy, 0, 0) != box_loss(energy, 1, 0)
    ramp = heads_of(BoxLoss(name="gaussian_nll", ramp_steps=10))
    np.testing.assert_allclose(box_loss(ramp, 0, 0), box_loss(heads_of("smooth_l1"), 0, 0), rtol=1e-6)
    np.testing.assert_allclose(box_loss(ramp, 0, 10), box_loss(heads_of("gaussian_nll"), 0, 0), rtol=1e-6)
    assert box_loss(ramp, 0, 5) != box_loss(ramp, 0, 10)


def iou_heads(class_agnostic):
    return heads_of(
        "smooth_l1",
        iou_head=IoUHead(num_classes=K, class_agnostic=class_agnostic, features=8),
        iou_pooler=RoIPooler(method="precise", levels=(3, 4), resolution=3),
        iou_batch_size_per_image=6,
    )


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_the_iou_head_learns_from_jittered_boxes_alone(class_agnostic):
    heads = iou_heads(class_agnostic)
    pyramid, _ = pyramid_and_boxes()
    gt = ground_truth([[4, 4, 60, 70], [10, 20, 40, 50]], [2, 0])
    gt = jax.tree.map(lambda x: np.stack([x, x]), gt)
    size = np.array([[96, 80], [96, 80]], np.int32)
    keys = jax.random.split(jax.random.key(3), 2)
    arguments = (pyramid, gt, size, np.array([True, True]), keys)
    variables = jax.jit(lambda *a: heads.init(jax.random.key(0), *a, method="iou_losses"))(*arguments)
    assert set(variables["params"]) == {"iou_head"}

    @jax.jit
    def total(variables, *arguments):
        found = heads.apply(variables, *arguments, method="iou_losses")
        return found.losses["loss_iou"], found.metrics

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(variables, *arguments)
    assert float(loss) > 0
    assert 0 < float(metrics["iou_error"]) < 1
    assert any((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(gradient))
    nobody = (pyramid, gt.replace(valid=np.zeros((2, 2), bool)), *arguments[2:])
    (loss, _), gradient = jax.value_and_grad(total, has_aux=True)(variables, *nobody)
    assert float(loss) == 0.0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_the_predicted_iou_is_that_of_the_class_and_has_a_gradient_in_the_box():
    heads = iou_heads(class_agnostic=False)
    pyramid, boxes = pyramid_and_boxes()
    first = {name: level[0] for name, level in pyramid.items()}
    classes = jnp.array([0, 1, 2, 0, 1])
    variables = jax.jit(
        lambda: heads.init(jax.random.key(0), first, boxes[0], classes, method="predict_iou")
    )()
    predict = jax.jit(
        lambda boxes, classes: heads.apply(variables, first, boxes, classes, method="predict_iou")
    )
    ious = predict(boxes[0], classes)
    assert ious.shape == (5,)
    by_class = jnp.stack([predict(boxes[0], jnp.full(5, k)) for k in range(K)])
    np.testing.assert_array_equal(ious, by_class[classes, jnp.arange(5)])
    gradient = jax.grad(lambda boxes: predict(boxes, classes).sum())(boxes[0])
    assert np.isfinite(gradient).all()
    assert (np.abs(np.asarray(gradient)).sum(axis=1) > 0).all()
