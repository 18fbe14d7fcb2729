import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.roi_max_pooling import roi_max_pool
from tests.cases import random_features
from tests.references import roi_max_pool as reference

jitted = jax.jit(roi_max_pool, static_argnames=("output_size", "spatial_scale"))


def boxes_around_the_map(count, *, seed=0):
    """Boxes around a map of 9 x 12 cells of stride 16; corners on half cells among them."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-80, 220, (count, 2))
    boxes = np.concatenate([corners, corners + np.exp(rng.uniform(0, 6, (count, 2)))], axis=1)
    boxes[: count // 3] = np.round(boxes[: count // 3] / 8) * 8
    return jnp.asarray(boxes, jnp.float32)


SPECIAL_BOXES = jnp.array(
    [
        [0, 0, 192, 144],  # the whole map
        [40, 40, 40, 40],  # no size
        [60, 50, 20, 10],  # inside out
        [-500, -500, 900, 900],  # larger than the map
        [400, 0, 500, 100],  # right of it
        [-400, -400, -300, -300],  # before it
        [0, 0, 896, 896],  # 57 cells, at which float32 would read one more
    ],
    jnp.float32,
)


@pytest.mark.parametrize("output_size", [1, 6, 7])
def test_against_the_loops(output_size):
    features = random_features(9, 12, 3)
    boxes = jnp.concatenate([boxes_around_the_map(40), SPECIAL_BOXES])
    expected, _ = reference.roi_max_pool(
        np.asarray(features), np.asarray(boxes), output_size=output_size, spatial_scale=1 / 16
    )
    found = jitted(features, boxes, output_size=output_size, spatial_scale=1 / 16)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_bins_by_hand():
    # Cells 0 to 4 (the last corner, 4, is inside): bins of 2.5 cells are cells 0-2 and 2-4.
    features = jnp.array([5.0, 1.0, 2.0, 3.0, 1.0, 9.0])[None, :, None]
    for pool in (roi_max_pool, jitted):
        pooled = pool(features, jnp.array([[0.0, 0, 4, 0]]), output_size=2, spatial_scale=1.0)
        assert pooled[0, :, :, 0].tolist() == [[5, 3], [5, 3]]
    # Two cells in four bins: each is read twice.
    pooled = jitted(features, jnp.array([[4.0, 0, 5, 0]]), output_size=4, spatial_scale=1.0)
    assert pooled[0, 0, :, 0].tolist() == [1, 1, 9, 9]


def test_corners_round_half_away_from_zero():
    features = jnp.arange(1.0, 6.0)[None, :, None]
    # 0.5 -> 1 and 2.5 -> 3: cells 1 to 3. -0.5 -> -1 and 1.5 -> 2: bins of 2 cells are -1, 0 and 1, 2.
    boxes = jnp.array([[0.5, 0, 2.5, 0], [-0.5, 0, 1.5, 0], [0.49999997, 0, 0.49999997, 0]])
    pooled = jitted(features, boxes, output_size=2, spatial_scale=1.0)
    assert pooled[:, 0, :, 0].tolist() == [[3, 4], [1, 3], [1, 1]]
    # Three cells left of the map and three on it.
    pooled = jitted(features, jnp.array([[-3.0, 0, 2, 0]]), output_size=2, spatial_scale=1.0)
    assert pooled[0, 0, :, 0].tolist() == [0, 3]


def test_empty_bins_are_zero_also_where_features_are_negative():
    features = -1.0 - jnp.arange(4.0).reshape(2, 2, 1)
    boxes = jnp.array([[32.0, 32, 60, 60], [-60, -60, -32, -32], [0, 0, 16, 16]])
    pooled = jitted(features, boxes, output_size=1, spatial_scale=1 / 16)
    assert pooled[:, 0, 0, 0].tolist() == [0, 0, -1]


def test_gradient_goes_to_the_maximum():
    features, boxes = (
        random_features(9, 12, 2, seed=3),
        jnp.concatenate([boxes_around_the_map(20, seed=4), SPECIAL_BOXES]),
    )
    cotangent = random_features(27, 3, 3, 2, seed=5)
    _, source = reference.roi_max_pool(
        np.asarray(features), np.asarray(boxes), output_size=3, spatial_scale=1 / 16
    )
    expected = np.zeros((9 * 12, 2))
    for (*where, channel), cell in np.ndenumerate(source):
        if cell >= 0:
            expected[cell, channel] += cotangent[(*where, channel)]

    @jax.jit
    def pull_back(features, boxes, cotangent):
        pool = functools.partial(roi_max_pool, output_size=3, spatial_scale=1 / 16)
        return jax.vjp(pool, features, boxes)[1](cotangent)

    of_features, of_boxes = pull_back(features, boxes, cotangent)
    np.testing.assert_allclose(of_features, expected.reshape(9, 12, 2), atol=1e-5)
    assert not of_boxes.any()


def test_equal_maxima_share_the_gradient():
    features = jnp.zeros((4, 4, 1))
    boxes = jnp.array([[0.0, 0, 2, 2]])
    gradient = jax.grad(lambda x: jitted(x, boxes, output_size=1, spatial_scale=1.0).sum())(features)
    np.testing.assert_allclose(gradient.sum(), 1.0, rtol=1e-6)
    assert (gradient[:3, :3] >= 0).all()
    assert not gradient[3].any()
    assert not gradient[:, 3].any()


def test_vmap_equals_images_one_by_one():
    features, boxes = random_features(2, 5, 6, 3), boxes_around_the_map(8, seed=6).reshape(2, 4, 4)
    pool = functools.partial(roi_max_pool, output_size=2, spatial_scale=1 / 16)
    batched = jax.jit(jax.vmap(pool))(features, boxes)
    for i in range(2):
        alone = jitted(features[i], boxes[i], output_size=2, spatial_scale=1 / 16)
        np.testing.assert_array_equal(batched[i], alone)
