import jax
import jax.numpy as jnp
import numpy as np

from klbox_jax.models.mask_head import Deconv2x2, MaskHead
from tests.references import networks as reference
from tests.thin import num_params

KEY = jax.random.key(0)


def test_shapes_and_parameters():
    head = MaskHead(num_classes=80)
    output, variables = jax.eval_shape(head.init_with_output, KEY, jnp.zeros((3, 14, 14, 256)))
    assert output.shape == (3, 80, 28, 28)
    convs = 4 * (9 * 256 * 256 + 256)
    assert num_params(variables) == convs + (4 * 256 * 256 + 256) + (256 * 80 + 80)


def test_against_the_loops():
    head = MaskHead(num_classes=3, features=6, num_convs=2)
    pooled = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 4)), jnp.float32)
    shapes = jax.eval_shape(head.init, KEY, pooled)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    found = jax.jit(head.apply)({"params": params}, pooled)
    for i, roi in enumerate(np.asarray(pooled)):
        np.testing.assert_allclose(found[i], reference.mask_head(roi, params, 2), atol=2e-5)


def test_a_cell_paints_its_kernel():
    # A lone 1 at (0, 1) of a 2 x 2 map paints the kernel, unflipped, into rows 0-1 and columns 2-3.
    x = jnp.zeros((1, 2, 2, 1)).at[0, 0, 1, 0].set(1.0)
    params = {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2, 1, 1), "bias": jnp.array([10.0])}
    y = Deconv2x2(features=1).apply({"params": params}, x)
    assert y[0, :, :, 0].tolist() == [[10, 10, 11, 12], [10, 10, 13, 14], [10, 10, 10, 10], [10, 10, 10, 10]]


def test_masks_start_undecided():
    head = MaskHead(num_classes=2, features=16)
    pooled = jnp.asarray(np.abs(np.random.default_rng(2).normal(size=(2, 7, 7, 16))), jnp.float32)
    logits, _ = jax.jit(head.init_with_output)(KEY, pooled)
    assert 0 < np.abs(logits).max() < 0.1
