import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import scenes
from klbox_jax.models.build import build_model
from klbox_jax.structures import Batch
from klbox_jax.train.init_or_restore import dummy_batch
from tests.thin import num_params, random_batch, scenes_config, thin_model


def train_losses(model):
    @jax.jit
    def run(params, batch, key):
        def total(params):
            outputs = model.apply({"params": params}, batch, key, method="train_forward")
            return sum(outputs.losses.values()), outputs

        return jax.value_and_grad(total, has_aux=True)(params)

    return run


@pytest.fixture(scope="module")
def model():
    # The second stage takes every candidate, whatever is drawn: then slots can be added without another draw.
    return thin_model(
        **{"model.roi_heads.batch_size_per_image": 48, "model.roi_heads.positive_fraction": 1.0}
    )


@pytest.fixture(scope="module")
def params(model):
    batch, key = dummy_batch((64, 96)), jax.random.key(0)
    return jax.jit(lambda: model.init(key, batch, key, method="train_forward")["params"])()


@pytest.fixture(scope="module")
def train(model):
    return train_losses(model)


@pytest.fixture(scope="module")
def predict(model):
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch, method="predict"))


def test_every_head_makes_the_parameters_of_training():
    model = thin_model(
        "loss=kl,iou_head=True", **{"model.mask_head": {"enabled": True, "features": 8, "num_convs": 1}}
    )
    batch, key = dummy_batch((64, 96)), jax.random.key(3)

    @jax.jit
    def both():
        return model.init(key, batch, key, method="train_forward"), model.init(
            key, batch, method="init_all_heads"
        )

    trained, initialised = both()
    assert {"mask_head", "iou_head"} <= set(initialised["params"]["roi_heads"])
    jax.tree.map(np.testing.assert_array_equal, initialised, trained)


def one_image(batch, i):
    return jax.tree.map(lambda x: x[i : i + 1], batch)


def test_losses_and_gradients_are_finite_and_named(train, params):
    (total, outputs), gradients = train(params, random_batch(), jax.random.key(1))
    assert set(outputs.losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert {"mean_log_var", "mean_sigma", "box_error", "accuracy_foreground"} <= set(outputs.metrics)
    assert np.isfinite(total)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    for part in ("backbone", "fpn", "rpn", "roi_heads"):
        assert sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradients[part])) > 0
    np.testing.assert_allclose(outputs.metrics["mean_sigma"], 1.0, atol=0.05)


def test_the_key_decides_what_is_drawn(train, params):
    batch = random_batch()
    (first, _), _ = train(params, batch, jax.random.key(1))
    (again, _), _ = train(params, batch, jax.random.key(1))
    (other, _), _ = train(params, batch, jax.random.key(2))
    assert float(first) == float(again) != float(other)


def test_an_empty_image_gives_finite_losses_and_gradients(train, params):
    batch = random_batch()
    empty = batch.replace(gt=batch.gt.replace(valid=np.zeros_like(batch.gt.valid)))
    (_, outputs), gradients = train(params, empty, jax.random.key(1))
    assert float(outputs.losses["loss_box_reg"]) == 0.0
    assert float(outputs.losses["loss_rpn_loc"]) == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((outputs, gradients)))


def test_padded_ground_truth_slots_change_nothing(model, train, params):
    (_, few), _ = train(params, random_batch(slots=8), jax.random.key(1))
    batch = random_batch(slots=8)
    junk = batch.gt.replace(
        boxes=np.tile(np.array([5, 5, 60, 50], np.float32), (2, 8, 1)),
        classes=np.full((2, 8), 2, np.int32),
        valid=np.zeros((2, 8), bool),
    )
    gt = jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), batch.gt, junk)
    forward = jax.jit(lambda *arguments: model.apply(*arguments, method="train_forward"))
    many = forward({"params": params}, batch.replace(gt=gt), jax.random.key(1))
    for name, value in few.losses.items():
        np.testing.assert_allclose(many.losses[name], value, rtol=1e-5, err_msg=name)
    assert float(many.metrics["num_foreground"]) == float(few.metrics["num_foreground"]) > 0


def garbage_in_the_padding(batch: Batch) -> Batch:
    noise = np.random.default_rng(9).integers(0, 256, batch.images.shape, np.uint8)
    images = np.array(batch.images)
    for i, (height, width) in enumerate(batch.image_size):
        images[i, height:] = noise[i, height:]
        images[i, :, width:] = noise[i, :, width:]
    assert (images != batch.images).any()
    return batch.replace(images=images)


def test_predictions_have_fixed_shapes_and_lie_in_their_images(predict, params):
    batch = random_batch(size=3)
    found = predict(params, batch)
    assert found.proposals.boxes.shape == (3, 32, 4)
    assert found.boxes.class_logits.shape == (3, 32, 4)
    assert found.boxes.box_deltas.shape == found.boxes.box_log_vars.shape == (3, 32, 1, 4)
    assert found.proposals.valid.any(axis=1).all()
    for i, (height, width) in enumerate(batch.image_size):
        boxes = np.asarray(found.proposals.boxes[i])[np.asarray(found.proposals.valid[i])]
        assert boxes.min() >= 0
        assert boxes[:, [0, 2]].max() <= width
        assert boxes[:, [1, 3]].max() <= height


def test_a_batch_is_its_images_one_by_one(predict, params):
    batch = random_batch(size=3)
    together = predict(params, batch)
    for i in range(3):
        alone = predict(params, one_image(batch, i))
        for ours, theirs in zip(jax.tree.leaves(one_image(together, i)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_lies_in_the_padding_cannot_matter(predict, train, params):
    batch = random_batch(size=3)
    clean, dirty = predict(params, batch), predict(params, garbage_in_the_padding(batch))
    for ours, theirs in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    batch = random_batch()
    (clean, _), _ = train(params, batch, jax.random.key(1))
    (dirty, _), _ = train(params, garbage_in_the_padding(batch), jax.random.key(1))
    assert float(clean) == float(dirty)


def conv(kernel, inputs, outputs):
    return kernel * kernel * inputs * outputs + outputs


def test_parameters_of_the_shipped_scenes_network():
    config = scenes.get_config("loss=kl")
    batch = dummy_batch((192, 192))
    key = jax.random.key(0)
    counts = {}
    for loss in ("kl", "smooth_l1"):
        config.model.box_loss = loss
        model = build_model(config.model, num_classes=5)
        shapes = jax.eval_shape(lambda model=model: model.init(key, batch, key, method="train_forward"))[
            "params"
        ]
        counts[loss] = {name: num_params(part) for name, part in shapes.items()}
    depth, levels = config.model.fpn.features, config.model.fpn.levels
    stages = [config.model.backbone.stage_features[level - 2] for level in levels]
    assert counts["kl"]["fpn"] == sum(conv(1, stage, depth) + conv(3, depth, depth) for stage in stages)
    wide = config.model.rpn.features
    anchors = len(config.model.rpn.anchor_sizes[0]) * len(config.model.rpn.aspect_ratios)
    assert counts["kl"]["rpn"] == conv(3, depth, wide) + conv(1, wide, anchors) + conv(1, wide, 4 * anchors)
    # The bins of a RoI, two layers, 5 classes and the background, and one box for all classes or for each.
    heads = config.model
    wide, bins = heads.box_head.features, heads.box_pooler.resolution**2
    boxes = 1 if heads.roi_heads.class_agnostic else 5
    shared = conv(1, bins * depth, wide) + conv(1, wide, wide) + conv(1, wide, 6) + conv(1, wide, 4 * boxes)
    assert counts["smooth_l1"]["roi_heads"] == shared
    assert counts["kl"]["roi_heads"] == shared + conv(1, wide, 4 * boxes)
    assert counts["kl"]["backbone"] == counts["smooth_l1"]["backbone"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "backbone.name",
            "vgg",
            r"config.model.backbone.name = 'vgg' is unknown; choose one of bottleneck_resnet, mobilenet_v2, ",
        ),
        ("dtype", "float16", r"config.model.dtype = 'float16' is unknown; choose one of bfloat16, float32"),
        (
            "box_loss",
            "l2",
            r"config.model.box_loss = 'l2' is unknown; choose one of beta_nll, direct_moment_matching, ",
        ),
        ("roi_heads.box_coder", "polar", r"config.model.roi_heads.box_coder = 'polar' is unknown"),
        ("roi_heads.box_coder", "center", r"needs config.model.roi_heads.box_coder = 'corner'"),
    ],
)
def test_what_a_config_may_not_name(field, value, message):
    config = scenes_config("loss=kl")
    config.update_from_flattened_dict({f"model.{field}": value})
    with pytest.raises(ValueError, match=message):
        build_model(config.model, num_classes=3)
