import jax
import jax.numpy as jnp
import numpy as np

from klbox_jax.losses.detection import class_loss, objectness_loss
from tests.references import losses as reference


def test_objectness_loss():
    rng = np.random.default_rng(0)
    logits, labels = np.float32(rng.normal(0, 4, 200)), rng.integers(0, 2, 200)
    expected = [reference.binary_cross_entropy(float(x), int(y)) for x, y in zip(logits, labels, strict=True)]
    loss = objectness_loss(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(
        objectness_loss(jnp.asarray(logits), jnp.asarray(labels == 1)),
        objectness_loss(jnp.asarray(logits), jnp.asarray(labels, jnp.float32)),
    )


def test_objectness_loss_by_hand():
    # log 2 at a logit of 0; no overflow far out: the loss is the distance to the right side.
    loss = objectness_loss(jnp.array([0.0, 1e4, -1e4, 1e4]), jnp.array([1, 1, 1, 0]))
    np.testing.assert_allclose(loss, [np.log(2), 0, 1e4, 1e4], rtol=1e-6)


def test_class_loss():
    rng = np.random.default_rng(1)
    logits, classes = np.float32(rng.normal(0, 3, (100, 6))), rng.integers(0, 6, 100)
    expected = [
        reference.softmax_cross_entropy(row.astype(float), c) for row, c in zip(logits, classes, strict=True)
    ]
    loss = class_loss(jnp.asarray(logits), jnp.asarray(classes))
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)


def test_class_loss_by_hand():
    # Four equal logits: log 4. A logit of 1000 is certain without overflow.
    logits = jnp.array([[0.0, 0, 0, 0], [1000.0, 0, 0, 0], [1000.0, 0, 0, 0]])
    np.testing.assert_allclose(
        class_loss(logits, jnp.array([3, 0, 1])), [np.log(4), 0, 1000], rtol=1e-6, atol=1e-6
    )


def test_gradients_are_residuals():
    # Softmax: p - onehot. Sigmoid: p - y.
    gradient = jax.grad(lambda x: class_loss(x, jnp.array([1])).sum())(jnp.zeros((1, 4)))
    np.testing.assert_allclose(gradient, [[0.25, -0.75, 0.25, 0.25]], rtol=1e-6)
    assert jax.grad(lambda x: objectness_loss(x, jnp.int32(1)))(jnp.float32(0)) == -0.5


def test_float32_from_low_precision():
    assert objectness_loss(jnp.zeros(3, jnp.bfloat16), jnp.zeros(3, jnp.int32)).dtype == jnp.float32
    assert class_loss(jnp.zeros((3, 2), jnp.bfloat16), jnp.zeros(3, jnp.int32)).dtype == jnp.float32
