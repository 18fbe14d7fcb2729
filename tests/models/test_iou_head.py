import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models.iou_head import IoUHead, iou_from_logits, iou_loss, normalize_iou
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
    # Above 1 and below 0 too, or refinement would stand still there.
    slopes = jax.vmap(jax.grad(iou_from_logits))(jnp.array([-5.0, -1.0, 0.3, 1.0, 4.0]))
    np.testing.assert_array_equal(slopes, 0.5)


def test_loss_by_hand():
    # Targets 1, 0 and -1: errors 0.5, 0 and 3.
    loss = iou_loss(jnp.array([0.5, 0.0, 2.0]), jnp.array([1.0, 0.5, 0.0]))
    np.testing.assert_allclose(loss, [0.125, 0, 2.5], atol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        iou_loss(jnp.zeros((3, 1)), jnp.zeros(3))
