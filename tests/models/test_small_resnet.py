import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models.small_resnet import BasicBlock, ResNet
from tests.thin import num_params


def block_params(channels, features):
    # Two 3x3 kernels, two norms of scale and bias, and a projected shortcut with its norm.
    return (
        9 * channels * features + 9 * features * features + 4 * features + channels * features + 2 * features
    )


def plain_block_params(features):
    return 2 * 9 * features * features + 4 * features  # the shortcut is the identity


@pytest.mark.parametrize(("canvas", "sides"), [((192, 192), (48, 24, 12, 6)), ((100, 84), (25, 13, 7, 4))])
def test_shapes_and_parameters(canvas, sides):
    network = ResNet(
        stem_features=32,
        stage_features=(32, 64, 128, 192),
        stage_blocks=(1, 2, 2, 1),
    )
    outputs, variables = jax.eval_shape(
        lambda: network.init_with_output(jax.random.key(0), jnp.zeros((1, *canvas, 3)))
    )
    assert [outputs[f"res{stage}"].shape[1] for stage in (2, 3, 4, 5)] == list(sides)
    assert [outputs[f"res{stage}"].shape[3] for stage in (2, 3, 4, 5)] == [32, 64, 128, 192]
    assert num_params(variables) == (
        (9 * 48 * 32 + 2 * 32)  # the stem: 3x3 over blocks of 4 x 4 pixels of 3 channels
        # A block that keeps both size and channels has no projection.
        + plain_block_params(32)
        + (block_params(32, 64) + plain_block_params(64))
        + (block_params(64, 128) + plain_block_params(128))
        + block_params(128, 192)
    )


def test_a_new_block_is_its_shortcut():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, 8)), jnp.float32)
    block = BasicBlock(features=8, strides=1, group_size=4)
    output, variables = jax.jit(block.init_with_output)(jax.random.key(0), x)
    assert num_params(variables) == plain_block_params(8)
    np.testing.assert_allclose(output, jnp.maximum(x, 0), atol=1e-6)


def test_an_image_does_not_see_its_neighbours():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 40, 3)), jnp.float32)
    network = ResNet(stem_features=8, stage_features=(8, 8), stage_blocks=(1, 1), group_size=4)
    variables = jax.jit(network.init)(jax.random.key(0), images)
    apply = jax.jit(network.apply)
    both = apply(variables, images)
    for i in range(2):
        alone = apply(variables, images[i : i + 1])
        for name, stage in alone.items():
            np.testing.assert_allclose(both[name][i : i + 1], stage, atol=1e-5, err_msg=name)
