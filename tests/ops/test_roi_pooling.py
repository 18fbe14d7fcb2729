import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.flops import largest_product_bytes, saved_bytes
from klbox_jax.ops import roi_pooling
from klbox_jax.ops.roi_pooler import assign_boxes_to_levels
from klbox_jax.ops.roi_pooling import (
    interpolation_matrix,
    multilevel_roi_align,
    pool_with_matrices,
    roi_align,
)
from tests.cases import random_boxes, random_features
from tests.references import roi_align as reference

STATIC = ("output_size", "sampling_ratio", "spatial_scale", "aligned")
jitted_roi_align = jax.jit(roi_align, static_argnames=STATIC)


SPECIAL_BOXES = np.array(
    [
        [0, 0, 96, 72],  # the whole map
        [8, 8, 16, 16],  # one cell
        [20, 30, 20, 30],  # no size
        [20, 30, 20, 50],  # no width
        [-7.9, -7.9, 4, 4],  # within one cell of the border
        [-4, -4, 4, 4],  # samples at exactly -1 under aligned=True
        [88, 64, 108, 84],  # over the far corner
        [200, 200, 300, 260],  # far outside
        [-300, -200, -100, -50],
        [-50, -50, 200, 200],  # larger than the map
    ],
    np.float32,
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(7, 2), (2, 1), (1, 4), (3, 3)])
def test_against_the_loops(output_size, sampling_ratio, aligned):
    features = random_features(9, 12, 3)
    boxes = np.concatenate([random_boxes(20, seed=1), SPECIAL_BOXES])
    arguments = {
        "output_size": output_size,
        "sampling_ratio": sampling_ratio,
        "spatial_scale": 1 / 8,
        "aligned": aligned,
    }
    expected = reference.roi_align(features, boxes, **arguments)
    found = jitted_roi_align(features, boxes, **arguments)
    assert found.shape == (30, output_size, output_size, 3)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    if (output_size, aligned) == (3, True):
        np.testing.assert_allclose(
            roi_align(jnp.asarray(features), jnp.asarray(boxes), **arguments), found, atol=1e-6
        )


@pytest.mark.parametrize(
    ("aligned", "expected"),
    [
        # Cell (i, j) of the map holds 5 i + j. The box covers cells 1 and 2 of both axes, a bin half a cell.
        # Without the shift the centre of the first bin reads the map at (1.25, 1.25): 6.25 + 1.25 = 7.5.
        (False, [[7.5, 8, 8.5, 9], [10, 10.5, 11, 11.5], [12.5, 13, 13.5, 14], [15, 15.5, 16, 16.5]]),
        # With it, at (0.75, 0.75): 3.75 + 0.75 = 4.5.
        (True, [[4.5, 5, 5.5, 6], [7, 7.5, 8, 8.5], [9.5, 10, 10.5, 11], [12, 12.5, 13, 13.5]]),
    ],
)
@pytest.mark.parametrize(
    "sampling_ratio", [1, 2]
)  # The map is linear: the mean of two samples is their middle.
def test_by_hand(aligned, expected, sampling_ratio):
    features = jnp.arange(25, dtype=jnp.float32).reshape(5, 5, 1)
    found = roi_align(
        features,
        jnp.array([[1.0, 1.0, 3.0, 3.0]]),
        output_size=4,
        sampling_ratio=sampling_ratio,
        spatial_scale=1.0,
        aligned=aligned,
    )
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-5)


def test_the_border_rule_by_hand():
    # One row of three cells 10, 20, 30; one sample each, at x - 0.5.
    features = jnp.array([10.0, 20.0, 30.0]).reshape(1, 3, 1)
    positions = jnp.array([-1.01, -1.0, -0.5, 0.0, 0.25, 2.0, 2.9, 3.0, 3.01])
    boxes = jnp.stack([positions + 0.5, 0.5 + 0 * positions, positions + 0.5, 0.5 + 0 * positions], axis=1)
    found = roi_align(features, boxes, output_size=1, sampling_ratio=1, spatial_scale=1.0)
    np.testing.assert_allclose(found[:, 0, 0, 0], [0, 10, 10, 10, 12.5, 30, 30, 30, 0], atol=1e-5)


def test_gradient_of_features_is_the_transpose_of_the_loops():
    features, boxes = random_features(4, 5, 1), np.array([[2, 1, 30, 25], [-9, 3, 12, 50]], np.float32)
    arguments = {"output_size": 2, "sampling_ratio": 2, "spatial_scale": 1 / 8}
    cotangent = random_features(2, 2, 2, 1, seed=5)

    def pull_back(features, boxes, cotangent):
        return jax.vjp(lambda features: roi_align(features, boxes, **arguments), features)[1](cotangent)

    (found,) = jax.jit(pull_back)(features, boxes, cotangent)
    expected = np.zeros(features.shape)
    for i, j in np.ndindex(4, 5):
        one_cell = np.zeros(features.shape)
        one_cell[i, j] = 1.0
        expected[i, j] = (reference.roi_align(one_cell, boxes, **arguments) * cotangent).sum()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
def test_gradient_of_boxes_against_finite_differences(aligned):
    features, boxes = random_features(6, 7, 2, seed=2), random_boxes(8, seed=4, canvas=50.0)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 12)  # more than one cell, where the size counts
    arguments = {"output_size": 2, "sampling_ratio": 2, "spatial_scale": 1 / 8, "aligned": aligned}
    cotangent = random_features(8, 2, 2, 2, seed=6)

    def value(function, boxes):
        return (function(features, boxes, **arguments) * cotangent).sum()

    def pool(features, boxes, **arguments):
        return roi_align(jnp.asarray(features), boxes, **arguments)

    found = jax.jit(jax.grad(functools.partial(value, pool)))(boxes)
    expected = np.zeros(boxes.shape)
    for index in np.ndindex(*boxes.shape):
        shift = np.zeros(boxes.shape)
        shift[index] = 1e-5
        wide = boxes.astype(np.float64)
        expected[index] = (
            value(reference.roi_align, wide + shift) - value(reference.roi_align, wide - shift)
        ) / 2e-5
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gradients_are_finite_for_boxes_without_size_and_outside():
    def value(features, boxes):
        return roi_align(features, boxes, output_size=2, sampling_ratio=2, spatial_scale=1 / 8).sum()

    gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(random_features(9, 12, 3), SPECIAL_BOXES)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_dtype_of_the_features_is_kept():
    features = jnp.asarray(random_features(6, 6, 2)).astype(jnp.bfloat16)
    found = roi_align(
        features, jnp.array([[4.0, 4, 30, 40]]), output_size=2, sampling_ratio=1, spatial_scale=1 / 8
    )
    assert found.dtype == jnp.bfloat16


def square(side, *, at=10.0):
    return [at, at, at + side, at + side]


@pytest.mark.parametrize(
    ("box", "level"),
    [
        (square(224), 4),  # the canonical box
        (square(223.9), 3),
        (square(112), 3),
        (square(111.9), 2),
        (square(448), 5),
        (square(447), 4),
        ([0, 0, 448, 112], 4),  # sqrt(448 * 112) = 224
        (square(10), 2),  # below the pyramid
        (square(5000), 5),  # above it
        (square(0), 2),
        ([50, 50, 20, 20], 2),  # reversed edges
    ],
)
def test_levels(box, level):
    found = assign_boxes_to_levels(jnp.array([box], jnp.float32), min_level=2, max_level=5)
    assert found.tolist() == [level - 2]
    assert found.dtype == jnp.int32


def test_levels_under_another_canonical_box():
    boxes = jnp.array([square(side) for side in (20.0, 48.0, 95.0, 96.0, 192.0)])
    found = assign_boxes_to_levels(
        boxes, min_level=3, max_level=5, canonical_box_size=96.0, canonical_level=4
    )
    # log2(48 / 96) = -1, log2(95 / 96) < 0, log2(192 / 96) = 1; levels 3 and down, 3, 3, 4, 5.
    assert found.tolist() == [0, 0, 0, 1, 2]


def test_each_box_is_pooled_from_its_level():
    strides, sides = (4, 8, 16, 32), (60.0, 150.0, 300.0, 500.0)
    maps = {
        stride: np.full((640 // stride, 640 // stride, 2), level, np.float32)
        for level, stride in enumerate(strides)
    }
    boxes = jnp.array([square(side, at=40.0) for side in (*sides, *sides[::-1])])

    def pool(maps, boxes):
        map_index = assign_boxes_to_levels(boxes, min_level=2, max_level=5)
        return multilevel_roi_align(maps, boxes, map_index, output_size=3, sampling_ratio=2)

    found = jax.jit(pool)(maps, boxes)
    assert found.shape == (8, 3, 3, 2)
    for row, level in zip(found, (0, 1, 2, 3, 3, 2, 1, 0), strict=True):
        np.testing.assert_allclose(row, level, atol=1e-5)


def test_several_levels_equal_the_loops_at_each_boxs_own():
    strides = (8, 16)
    maps = [random_features(10, 12, 3, seed=1), random_features(5, 6, 3, seed=2)]
    boxes = random_boxes(12, seed=3, canvas=80.0)
    arguments = {"output_size": 2, "sampling_ratio": 2}

    def pool(maps, boxes):
        map_index = assign_boxes_to_levels(boxes, min_level=3, max_level=4, canonical_box_size=40.0)
        return multilevel_roi_align(dict(zip(strides, maps, strict=True)), boxes, map_index, **arguments)

    found = jax.jit(pool)(maps, boxes)
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(axis=1))
    assert {bool(side >= 40) for side in sides} == {True, False}
    for row, box, side in zip(found, boxes, sides, strict=True):
        level = 1 if side >= 40 else 0
        expected = reference.roi_align(maps[level], box[None], spatial_scale=1 / strides[level], **arguments)
        np.testing.assert_allclose(row, expected[0], atol=2e-5)


def test_maps_count_from_the_smallest_stride_in_any_order():
    maps = {16: jnp.full((4, 4, 1), 16.0), 8: jnp.full((8, 8, 1), 8.0)}
    boxes = jnp.array([[10.0, 10, 30, 30], [10, 10, 30, 30]])
    found = multilevel_roi_align(maps, boxes, jnp.array([0, 1]), output_size=1, sampling_ratio=2)
    np.testing.assert_allclose(found[:, 0, 0, 0], [8, 16], rtol=1e-6)


@pytest.mark.parametrize("small_map", [0, 2**15])
def test_no_boxes(small_map, monkeypatch):
    monkeypatch.setattr(roi_pooling, "SMALL_MAP", small_map)

    def pooled(features, boxes):
        return roi_align(features, boxes, output_size=2, sampling_ratio=2, spatial_scale=1 / 8)

    features, boxes = jnp.ones((9, 12, 3)), jnp.zeros((0, 4))
    assert pooled(features, boxes).shape == (0, 2, 2, 3)
    gradients = jax.jit(jax.grad(lambda *arguments: pooled(*arguments).sum(), argnums=(0, 1)))(
        features, boxes
    )
    np.testing.assert_array_equal(gradients[0], np.zeros((9, 12, 3)))
    assert gradients[1].shape == (0, 4)


def multiplied(features, boxes, *, stride=8):
    """The form for accelerators: 2 x 2 bins of 2 x 2 samples."""
    x1, y1, x2, y2 = jnp.moveaxis(boxes / stride - 0.5, -1, 0)
    sizes = {"output_size": 2, "sampling_ratio": 2}
    rows = interpolation_matrix(y1, y2, length=features.shape[0], **sizes)
    columns = interpolation_matrix(x1, x2, length=features.shape[1], **sizes)
    return pool_with_matrices(features, rows, columns)


def test_images_under_vmap_and_windows_equal_the_products(monkeypatch):
    """Maps of 19 x 11 cells have windows that end at the border, and RoIs of the other level have none."""
    monkeypatch.setattr(roi_pooling, "SMALL_MAP", 0)
    maps = random_features(2, 19, 11, 3), random_features(2, 10, 6, 3, seed=1)
    special = np.tile(SPECIAL_BOXES[None], (2, 1, 1))
    boxes = np.concatenate([random_boxes(2 * 14, seed=9, canvas=150.0).reshape(2, 14, 4), special], axis=1)
    cotangent = random_features(2, 24, 2, 2, 3, seed=8)

    def forms(maps, boxes, cotangent):
        levels = assign_boxes_to_levels(boxes, min_level=3, max_level=4, canonical_box_size=60.0)

        def aligned(maps, boxes):
            by_stride = dict(zip((8, 16), maps, strict=True))
            return multilevel_roi_align(by_stride, boxes, levels, output_size=2, sampling_ratio=2)

        def expected(maps, boxes):
            chosen = (levels == 1)[:, None, None, None]
            return jnp.where(chosen, multiplied(maps[1], boxes, stride=16), multiplied(maps[0], boxes))

        pulled = (jax.vjp(function, maps, boxes) for function in (aligned, expected))
        return levels, [jax.tree.leaves((pooled, vjp(cotangent))) for pooled, vjp in pulled]

    levels, (found, expected) = jax.jit(jax.vmap(forms))(maps, boxes, cotangent)
    assert 5 < levels.sum() < 43
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    # One pyramid under the RoIs of two images.
    first = tuple(features[0] for features in maps)
    _, apart = jax.jit(jax.vmap(forms, in_axes=(None, 0, 0)))(first, boxes, cotangent)
    for one, other in zip(*apart, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_only_cpus_take_the_form_with_taps():
    def gradients(features, boxes):
        def value(features):
            return roi_align(features, boxes, output_size=2, sampling_ratio=2, spatial_scale=1 / 8).sum()

        return jax.value_and_grad(value)(features)

    arguments = jnp.zeros((64, 64, 16)), jnp.zeros((5, 4))
    for platform in ("cpu", "cuda", "tpu"):
        text = jax.export.export(jax.jit(gradients), platforms=[platform])(*arguments).mlir_module()
        assert ("stablehlo.while" in text) == (platform == "cpu")
        assert ("stablehlo.gather" in text) == (platform == "cpu")


def test_groups_of_rois_give_what_all_at_once_give(monkeypatch):
    """Of 11 RoIs, 3 at a time: the fourth group has one RoI that is nobody's."""
    features, boxes = random_features(9, 12, 3), random_boxes(11, seed=7)
    cotangent = random_features(11, 2, 2, 3, seed=8)

    # A function of its own for each limit: jit remembers what it traced.
    def value_and_gradients():
        def pull_back(features, boxes):
            pooled, vjp = jax.vjp(multiplied, features, boxes)
            return pooled, *vjp(cotangent)

        return jax.jit(pull_back)

    at_once = value_and_gradients()
    expected = at_once(features, boxes)
    assert "while" not in str(at_once.trace(features, boxes).jaxpr)
    monkeypatch.setattr(roi_pooling, "MOST_BANDED", 3 * 2 * 12 * 3)
    grouped = value_and_gradients()
    text = str(grouped.trace(features, boxes).jaxpr)
    assert "scan" in text
    assert "length=4" in text
    for found, wanted in zip(grouped(features, boxes), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(
        grouped(features, boxes)[0],
        reference.roi_align(features, boxes, output_size=2, sampling_ratio=2, spatial_scale=1 / 8),
        atol=2e-5,
    )
    # A limit below a single RoI: one at a time.
    monkeypatch.setattr(roi_pooling, "MOST_BANDED", 1)
    np.testing.assert_allclose(value_and_gradients()(features, boxes)[0], expected[0], atol=1e-5)


def test_groups_keep_one_groups_product_and_no_more():
    features = jax.ShapeDtypeStruct((200, 336, 256), jnp.float32)
    boxes = jax.ShapeDtypeStruct((512, 4), jnp.float32)

    def loss(features, boxes):
        pooled = roi_align(features, boxes, output_size=7, sampling_ratio=2, spatial_scale=1 / 4)
        return jnp.square(pooled).sum()

    for differentiated in (0, (0, 1)):
        step = jax.make_jaxpr(jax.grad(loss, argnums=differentiated))(features, boxes)
        # 27 RoIs at once, 7 rows of bins each, or the gradient of the map; all RoIs would be 1233 MB.
        assert largest_product_bytes(step.jaxpr) <= 4 * max(27 * 7 * 336 * 256, 200 * 336 * 256)
        assert saved_bytes(loss, features, boxes) < 100e6
