import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models.iou_head import IoUHead
from klbox_jax.ops.roi_pooler import RoIPooler
from tests.models.roi_cases import K, ground_truth, heads_of, pyramid_and_boxes


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
