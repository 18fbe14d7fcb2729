import jax
import jax.numpy as jnp
import numpy as np

from klbox_jax.losses.mask import mask_loss, mask_of_class
from tests.references import losses as reference


def case(seed=0, rois=6, classes=4, side=3):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 3, (rois, classes, side, side)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 2, (rois, side, side)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, classes, rois), jnp.int32), targets


def test_against_the_loops():
    logits, classes, targets = case()
    expected = [
        np.mean(
            [
                reference.binary_cross_entropy(float(logits[r, classes[r], i, j]), float(targets[r, i, j]))
                for i in range(3)
                for j in range(3)
            ]
        )
        for r in range(6)
    ]
    np.testing.assert_allclose(mask_loss(logits, classes, targets), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(mask_loss)(logits, classes, targets), expected, rtol=1e-5)


def test_by_hand():
    # Logits of 0 cost log 2 whatever the target; a sure one costs nothing, a surely wrong one its size.
    logits = jnp.array([[0.0, 0.0], [1e4, -1e4]]).reshape(1, 1, 2, 2)
    targets = jnp.array([[1.0, 0.0], [1.0, 1.0]])[None]
    loss = mask_loss(logits, jnp.array([0]), targets)
    np.testing.assert_allclose(loss, [(2 * np.log(2) + 0 + 1e4) / 4], rtol=1e-6)


def test_only_the_true_class_is_trained():
    logits, classes, targets = case(seed=1)
    gradient = jax.grad(lambda x: mask_loss(x, classes, targets).sum())(logits)
    expected = np.zeros(logits.shape)
    for r, k in enumerate(classes):
        # (sigmoid - target) over the nine cells of the mean
        expected[r, k] = (1 / (1 + np.exp(-np.float64(logits[r, k]))) - targets[r]) / 9
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_one_mask_for_all_classes_and_leading_axes():
    logits, classes, targets = case(seed=2, classes=1)
    np.testing.assert_array_equal(mask_of_class(logits, classes + 7), logits[:, 0])
    logits, classes, targets = case(seed=3)
    batched = mask_loss(*(x.reshape(2, 3, *x.shape[1:]) for x in (logits, classes, targets)))
    np.testing.assert_allclose(batched.reshape(6), mask_loss(logits, classes, targets), rtol=1e-6)


def test_float32_from_low_precision():
    logits, classes, targets = case()
    assert mask_loss(logits.astype(jnp.bfloat16), classes, targets).dtype == jnp.float32
