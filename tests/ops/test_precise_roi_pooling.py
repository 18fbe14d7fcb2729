import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.precise_roi_pooling import multilevel_precise_roi_pool, precise_roi_pool
from klbox_jax.ops.roi_pooler import assign_boxes_to_levels
from klbox_jax.ops.roi_pooling import roi_align
from tests.cases import random_boxes, random_features
from tests.references import precise_roi_pooling as reference

jitted_pool = jax.jit(precise_roi_pool, static_argnames=("output_size", "spatial_scale", "aligned"))


SPECIAL_BOXES = np.array(
    [
        [0, 0, 96, 72],  # the whole map
        [8, 8, 16, 16],  # one cell
        [4, 4, 12, 12],  # from centre to centre
        [20, 30, 20.3, 50],  # far narrower than a cell
        [-7.9, -7.9, 4, 4],  # around the corner
        [88, 64, 108, 84],
        [200, 200, 300, 260],  # far outside
        [-300, -200, -100, -50],
        [-50, -50, 200, 200],  # larger than the map
    ],
    np.float32,
)
EMPTY_BOXES = np.array(
    [
        [20, 30, 20, 30],  # no size
        [20, 30, 20, 50],  # no width
        [50, 30, 20, 60],  # reversed
        [0, 0, 0, 0],  # a padded row
        [1e6, 1e6, 1e6, 1e6],
        [-1e6, 5, -1e6 + 1, 9],
    ],
    np.float32,
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("output_size", [1, 2, 5])
def test_against_the_loops(output_size, aligned):
    features = random_features(9, 12, 3)
    boxes = np.concatenate([random_boxes(20, seed=1), SPECIAL_BOXES])
    arguments = {"output_size": output_size, "spatial_scale": 1 / 8, "aligned": aligned}
    expected = reference.precise_roi_pool(features, boxes, **arguments)
    found = jitted_pool(features, boxes, **arguments)
    assert found.shape == (29, output_size, output_size, 3)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    if (output_size, aligned) == (2, True):
        eager = precise_roi_pool(jnp.asarray(features), jnp.asarray(boxes), **arguments)
        np.testing.assert_allclose(eager, found, atol=1e-6)


def test_against_dense_sampling():
    features = random_features(6, 7, 2, seed=3)
    boxes = np.array([[3, 5, 41, 30], [-20, 10, 17, 90]], np.float32)
    arguments = {"output_size": 2, "spatial_scale": 1 / 8}
    expected = reference.precise_roi_pool(
        features, boxes, **arguments, mean_over_bin=reference.sampled_mean_over_bin
    )
    np.testing.assert_allclose(jitted_pool(features, boxes, **arguments), expected, atol=1e-3)


def test_by_hand():
    # One row of three cells at x = 0, 1, 2. Along y the row's tent has the mean 1/2 over [-1, 0] and [0, 1];
    # along x the map is 10 + 10 x up to x = 2, then falls to zero at x = 3.
    features = jnp.array([10.0, 20.0, 30.0]).reshape(1, 3, 1)
    pool = functools.partial(jitted_pool, features, output_size=2, spatial_scale=1.0)
    found = pool(jnp.array([[0.0, -1.0, 2.0, 1.0], [1.0, -1.0, 5.0, 1.0]]), aligned=False)[..., 0]
    # Means 15 and 25; then ((20 + 30) / 2 + 30 / 2) / 2 = 20 over [1, 3], and nothing over [3, 5].
    np.testing.assert_allclose(found, [[[7.5, 12.5]] * 2, [[10, 0]] * 2], atol=1e-5)
    # The same under half-cell centres, half a pixel on.
    shifted = pool(jnp.array([[0.5, -0.5, 2.5, 1.5], [1.5, -0.5, 5.5, 1.5]]))[..., 0]
    np.testing.assert_allclose(shifted, found, atol=1e-5)
    # The reference's convention: (0, 0, 4, 4) covers 4 x 4 cells. A map of ones has the mean 1 - 1/8 over
    # [-1/2, 1/2] along each axis.
    ones = jnp.ones((8, 8, 1))
    found = jitted_pool(ones, jnp.array([[0.0, 0, 4, 4]]), output_size=4, spatial_scale=1.0)[0, ..., 0]
    np.testing.assert_allclose(found[0], [0.875**2, 0.875, 0.875, 0.875], atol=1e-5)
    np.testing.assert_allclose(found[1:, 1:], 1, atol=1e-5)


def test_roi_align_with_many_samples_comes_near():
    features, boxes = random_features(9, 12, 3), np.array([[10, 9, 60, 50], [30, 20, 85, 61]], np.float32)
    dense = jax.jit(functools.partial(roi_align, output_size=3, sampling_ratio=50, spatial_scale=1 / 8))(
        features, boxes
    )
    found = jitted_pool(features, boxes, output_size=3, spatial_scale=1 / 8)
    np.testing.assert_allclose(found, dense, atol=1e-3)


@pytest.mark.parametrize("aligned", [True, False])
def test_gradient_of_boxes_against_finite_differences(aligned):
    features = random_features(6, 7, 2, seed=2)
    # Whole cells too: there the edges lie on the kinks of the interpolation.
    boxes = np.concatenate([random_boxes(8, seed=4, canvas=50.0), [[8, 8, 40, 24], [4, 12, 36, 44]]])
    boxes = boxes.astype(np.float32)
    arguments = {"output_size": 2, "spatial_scale": 1 / 8, "aligned": aligned}
    cotangent = random_features(10, 2, 2, 2, seed=6)

    def value(function, boxes):
        return (function(features, boxes, **arguments) * cotangent).sum()

    def pool(features, boxes, **arguments):
        return precise_roi_pool(jnp.asarray(features), boxes, **arguments)

    found = jax.jit(jax.grad(functools.partial(value, pool)))(boxes)
    expected = np.zeros(boxes.shape)
    for index in np.ndindex(*boxes.shape):
        shift = np.zeros(boxes.shape)
        shift[index] = 1e-5
        wide = boxes.astype(np.float64)
        expected[index] = (
            value(reference.precise_roi_pool, wide + shift) - value(reference.precise_roi_pool, wide - shift)
        ) / 2e-5
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_gradient_is_continuous_where_roi_aligns_jumps():
    # A ridge along the third column, at the pixel x = 20.
    features = jnp.tile(jnp.array([0.0, 1, 2, 1, 0, 0])[None, :, None], (6, 1, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(pool, right):
        """The slope in the right edge of [8, right], a hundredth of a pixel before and after `right`."""
        boxes = jnp.array([[8.0, 8, 0, 36], [8.0, 8, 0, 36]])
        return jax.grad(
            lambda rights: pool(
                features, boxes.at[:, 2].set(rights), output_size=1, spatial_scale=1 / 8
            ).sum()
        )(right + jnp.array([-1e-2, 1e-2]))

    # Where the edge crosses the ridge, the value at the edge less the mean, over the width, for each pixel:
    # (2 - 1.25) / 1.5 / 8 on both sides.
    np.testing.assert_allclose(slopes(precise_roi_pool, 20.0), 0.0625, rtol=1e-2)
    # RoIAlign's one sample, in the middle of the box, crosses it as the edge passes 32.
    found = slopes(functools.partial(roi_align, sampling_ratio=1), 32.0)
    np.testing.assert_allclose(found, [0.0625, -0.0625], rtol=1e-4)


def test_gradient_of_features_is_the_transpose_of_the_loops():
    features, boxes = random_features(4, 5, 1), np.array([[2, 1, 30, 25], [-9, 3, 12, 50]], np.float32)
    arguments = {"output_size": 2, "spatial_scale": 1 / 8}
    cotangent = random_features(2, 2, 2, 1, seed=5)

    def pull_back(features, boxes, cotangent):
        return jax.vjp(lambda features: precise_roi_pool(features, boxes, **arguments), features)[1](
            cotangent
        )

    (found,) = jax.jit(pull_back)(features, boxes, cotangent)
    expected = np.zeros(features.shape)
    for i, j in np.ndindex(4, 5):
        one_cell = np.zeros(features.shape)
        one_cell[i, j] = 1.0
        expected[i, j] = (reference.precise_roi_pool(one_cell, boxes, **arguments) * cotangent).sum()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_empty_box_is_read_at_its_first_edge():
    features = random_features(9, 12, 2)
    found = jitted_pool(features, EMPTY_BOXES[:1], output_size=3, spatial_scale=1 / 8)
    # The pixel (20, 30) is the cell (2, 3.25).
    expected = reference.interpolated(features.astype(np.float64), 3.25, 2.0)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-2)


def test_values_and_gradients_are_finite_and_bounded_for_empty_boxes():
    boxes = np.concatenate([EMPTY_BOXES, SPECIAL_BOXES])

    def value(features, boxes):
        return precise_roi_pool(features, boxes, output_size=2, spatial_scale=1 / 8).sum()

    found, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(random_features(9, 12, 3), boxes)
    assert np.isfinite(found)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        # 12 numbers a box, with slopes of at most some 4 a cell of 8 pixels.
        assert np.abs(gradient).max() < 20


def test_weight_zero_leaves_a_roi_out():
    features, boxes = jnp.asarray(random_features(6, 6, 2)), jnp.asarray(random_boxes(3, canvas=40.0))
    pool = functools.partial(jitted_pool, features, output_size=2, spatial_scale=1 / 8)
    found = pool(boxes, weights=jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(found[::2], pool(boxes)[::2], atol=1e-6)


def test_the_dtype_of_the_features_is_kept():
    features = jnp.asarray(random_features(6, 6, 2)).astype(jnp.bfloat16)
    found = precise_roi_pool(features, jnp.array([[4.0, 4, 30, 40]]), output_size=2, spatial_scale=1 / 8)
    assert found.dtype == jnp.bfloat16


def test_several_levels_equal_the_loops_at_each_boxs_own():
    strides = (8, 16)
    maps = [jnp.asarray(random_features(10, 12, 3, seed=1)), jnp.asarray(random_features(5, 6, 3, seed=2))]
    boxes = np.concatenate([random_boxes(12, seed=3, canvas=80.0), EMPTY_BOXES])

    def pool(maps, boxes):
        map_index = assign_boxes_to_levels(boxes, min_level=3, max_level=4, canonical_box_size=40.0)
        return multilevel_precise_roi_pool(
            dict(zip(strides, maps, strict=True)), boxes, map_index, output_size=2
        )

    found = jax.jit(pool)(maps, boxes)
    sides = np.sqrt((boxes[:12, 2:] - boxes[:12, :2]).astype(np.float64).prod(axis=1))
    assert {bool(side >= 40) for side in sides} == {True, False}
    for row, box, side in zip(found, boxes[:12], sides, strict=False):
        level = 1 if side >= 40 else 0
        expected = reference.precise_roi_pool(
            maps[level], box[None], output_size=2, spatial_scale=1 / strides[level]
        )
        np.testing.assert_allclose(row, expected[0], atol=2e-5)
    gradient = jax.jit(jax.grad(lambda boxes: pool(maps, boxes).sum()))(boxes)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient[:12]) != 0).any()
