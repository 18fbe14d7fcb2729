import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models.iou_head import IoUHead, iou_from_logits, iou_loss, normalize_iou
from klbox_jax.ops.roi_pooler import RoIPooler
from tests.cases import ground_truth
from tests.models.roi_cases import K, pyramid_and_boxes
from tests.thin import num_params


@pytest.mark.parametrize(("class_agnostic", "outputs"), [(True, 1), (False, 3)])
def test_shapes_and_parameters(class_agnostic, outputs):
    head = IoUHead(num_classes=3, class_agnostic=class_agnostic, features=16)
    pooled = jnp.ones((5, 2, 2, 4), jnp.bfloat16)
    logits, variables = jax.jit(head.init_with_output)(jax.random.key(0), pooled)
    assert logits.shape == (5, outputs)
    assert logits.dtype == jnp.float32
    # 2 x 2 bins of 4 channels to 16, 16 to 16, and the outputs.
    assert num_params(variables) == (16 * 16 + 16) * 2 + 16 * outputs + outputs


def test_against_the_layers_by_hand():
    head = IoUHead(num_classes=2, class_agnostic=False, features=8)
    pooled = np.random.default_rng(0).normal(size=(3, 2, 2, 2)).astype(np.float32)
    variables = head.init(jax.random.key(1), jnp.asarray(pooled))
    x = pooled.reshape(3, 8)
    params = variables["params"]
    for layer in (params["box_head"]["fc1"], params["box_head"]["fc2"], params["iou_pred"]):
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        x = x if layer is params["iou_pred"] else np.maximum(x, 0)
    np.testing.assert_allclose(head.apply(variables, jnp.asarray(pooled)), x, atol=1e-5)


def test_normalised_iou_by_hand_and_back():
    ious = jnp.array([0.0, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(normalize_iou(ious), [-1, 0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(iou_from_logits(normalize_iou(ious)), ious, atol=1e-6)


def test_the_prediction_has_a_slope_everywhere():
    # Above 1 and below 0 too; without a slope, refinement would stop there.
    slopes = jax.vmap(jax.grad(iou_from_logits))(jnp.array([-5.0, -1.0, 0.3, 1.0, 4.0]))
    np.testing.assert_array_equal(slopes, 0.5)


def test_loss_by_hand():
    # Targets 1, 0 and -1: errors 0.5, 0 and 3.
    loss = iou_loss(jnp.array([0.5, 0.0, 2.0]), jnp.array([1.0, 0.5, 0.0]))
    np.testing.assert_allclose(loss, [0.125, 0, 2.5], atol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        iou_loss(jnp.zeros((3, 1)), jnp.zeros(3))


def iou_head(class_agnostic):
    return IoUHead(
        num_classes=K,
        class_agnostic=class_agnostic,
        pooler=RoIPooler(method="precise", levels=(3, 4), resolution=3),
        features=8,
        batch_size_per_image=6,
    )


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_the_iou_head_learns_from_jittered_boxes_alone(class_agnostic):
    head = iou_head(class_agnostic)
    pyramid, _ = pyramid_and_boxes()
    gt = ground_truth([[4, 4, 60, 70], [10, 20, 40, 50]], [2, 0])
    gt = jax.tree.map(lambda x: np.stack([x, x]), gt)
    size = np.array([[96, 80], [96, 80]], np.int32)
    keys = jax.random.split(jax.random.key(3), 2)
    arguments = (pyramid, gt, size, np.array([True, True]), keys)
    variables = jax.jit(lambda *a: head.init(jax.random.key(0), *a, method="losses"))(*arguments)
    assert set(variables["params"]) == {"box_head", "iou_pred"}

    @jax.jit
    def total(variables, *arguments):
        found = head.apply(variables, *arguments, method="losses")
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
    head = iou_head(class_agnostic=False)
    pyramid, boxes = pyramid_and_boxes()
    first = {name: level[0] for name, level in pyramid.items()}
    classes = jnp.array([0, 1, 2, 0, 1])
    variables = jax.jit(lambda: head.init(jax.random.key(0), first, boxes[0], classes, method="predict"))()
    predict = jax.jit(lambda boxes, classes: head.apply(variables, first, boxes, classes, method="predict"))
    ious = predict(boxes[0], classes)
    assert ious.shape == (5,)
    by_class = jnp.stack([predict(boxes[0], jnp.full(5, k)) for k in range(K)])
    np.testing.assert_array_equal(ious, by_class[classes, jnp.arange(5)])
    gradient = jax.grad(lambda boxes: predict(boxes, classes).sum())(boxes[0])
    assert np.isfinite(gradient).all()
    assert (np.abs(np.asarray(gradient)).sum(axis=1) > 0).all()
