import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.boxes import (
    area,
    clip_to_image,
    is_nonempty,
    paired_iou,
    pairwise_intersection,
    pairwise_iou,
)
from tests.references.boxes import clustered_boxes, iou_matrix, share_inside

jitted_iou = jax.jit(pairwise_iou)
iou_gradients = jax.jit(jax.grad(lambda a, b: pairwise_iou(a, b).sum(), argnums=(0, 1)))


def test_iou_by_hand():
    a = jnp.array([[0.0, 0.0, 4.0, 2.0]])
    b = jnp.array(
        [
            [0.0, 0.0, 4.0, 2.0],  # the same box: 1
            [2.0, 0.0, 6.0, 2.0],  # shared 2 x 2, union 8 + 8 - 4: 1 / 3
            [1.0, 1.0, 2.0, 2.0],  # inside, 1 of 8: 1 / 8
            [4.0, 0.0, 8.0, 2.0],  # touching edges share nothing
            [5.0, 5.0, 5.0, 5.0],  # empty
            [4.0, 2.0, 0.0, 0.0],  # reversed, so empty
        ]
    )
    np.testing.assert_allclose(jitted_iou(a, b), [[1, 1 / 3, 1 / 8, 0, 0, 0]], rtol=1e-6)


def test_iou_equals_loops_and_is_symmetric():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 1300, (60, 4)).astype(np.float32)  # about three quarters of them reversed
    a[:30, 2:] = a[:30, :2] + rng.uniform(0, 600, (30, 2)).astype(np.float32)
    b = np.concatenate([clustered_boxes(rng, 40), a[:10]])
    iou = pairwise_iou(jnp.asarray(a), jnp.asarray(b))
    assert iou.dtype == jnp.float32
    np.testing.assert_allclose(iou, iou_matrix(a, b), atol=1e-6)
    np.testing.assert_array_equal(iou, pairwise_iou(jnp.asarray(b), jnp.asarray(a)).T)
    np.testing.assert_allclose(jitted_iou(a, b), iou, atol=1e-6)


def test_paired_iou_is_the_diagonal():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(0, 4, (200, 4)).astype(np.float32)) for _ in range(2))
    iou = paired_iou(tuple(a.T), tuple(b.T))
    assert (iou > 0).any()
    np.testing.assert_array_equal(iou, jnp.diagonal(pairwise_iou(a, b)))


def test_intersection_equals_the_share_of_the_area():
    rng = np.random.default_rng(1)
    boxes = clustered_boxes(rng, 20)
    intersection = pairwise_intersection(jnp.asarray(boxes), jnp.asarray(boxes))
    share = intersection / area(jnp.asarray(boxes))[:, None]
    expected = [[share_inside(row, column) for column in boxes] for row in boxes]
    np.testing.assert_allclose(share, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "box",
    [
        [0.0, 0.0, 0.0, 0.0],
        [3.0, 3.0, 3.0, 9.0],
        [9.0, 9.0, 3.0, 3.0],
        [2.0, 2.0, 2.0 + 2.4e-7, 2.0 + 2.4e-7],
    ],
)
def test_iou_gradient_is_finite_for_degenerate_boxes(box):
    degenerate = jnp.array([box, box])
    regular = jnp.array([[2.0, 2.0, 8.0, 8.0]])
    for other in (degenerate, regular):
        for gradient in iou_gradients(degenerate, other):
            assert np.isfinite(gradient).all()


def test_iou_gradient_by_hand():
    # The IoU of [0, 0, x2, 1] inside [0, 0, 10, 1] is x2 / 10, and x2 / X2 as a function of the outer X2.
    inner, outer = jnp.array([[0.0, 0.0, 4.0, 1.0]]), jnp.array([[0.0, 0.0, 10.0, 1.0]])
    of_inner, of_outer = iou_gradients(inner, outer)
    np.testing.assert_allclose(of_inner[0, 2], 0.1, rtol=1e-5)
    np.testing.assert_allclose(of_outer[0, 2], -0.04, rtol=1e-5)


def test_area_clip_and_nonempty_by_hand():
    boxes = jnp.array([[-5.0, 2.0, 3.0, 60.0], [10.0, 10.0, 12.0, 11.0], [110.0, 3.0, 120.0, 9.0]])
    clipped = clip_to_image(boxes, jnp.array([50, 100]))  # height 50, width 100
    np.testing.assert_array_equal(clipped, [[0, 2, 3, 50], [10, 10, 12, 11], [100, 3, 100, 9]])
    np.testing.assert_array_equal(area(boxes), [8 * 58, 2, 60])
    np.testing.assert_array_equal(area(clipped), [3 * 48, 2, 0])
    np.testing.assert_array_equal(is_nonempty(clipped), [True, True, False])
    # Longer than, not as long as: the second box is 1 pixel high.
    np.testing.assert_array_equal(is_nonempty(clipped, min_size=1.0), [True, False, False])


def test_a_pixel_may_be_left_of_a_box_beside_the_image():
    # To the right of it, above it, across its corner, inside it; pixels of 2 by 1 in the last call.
    boxes = jnp.array([[110.0, 3, 120, 9], [5, -9, 8, -2], [-5, -5, 3, 4], [10, 10, 12, 11]])
    size = jnp.array([50, 100])
    clipped = clip_to_image(boxes, size, pixel=jnp.ones(2))
    np.testing.assert_array_equal(clipped, [[99, 3, 100, 9], [5, 0, 8, 1], [0, 0, 3, 4], [10, 10, 12, 11]])
    np.testing.assert_array_equal(clip_to_image(boxes, size, pixel=jnp.array([2.0, 1]))[0], [98, 3, 100, 9])
