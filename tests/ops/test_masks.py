import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.masks import crop_and_resize_masks
from tests.references import masks as reference

jitted = jax.jit(crop_and_resize_masks, static_argnames="output_size")


def crop(masks, mask_boxes, boxes, gt_index, output_size):
    return jitted(
        jnp.asarray(masks, jnp.uint8),
        jnp.asarray(mask_boxes, jnp.float32),
        jnp.asarray(boxes, jnp.float32),
        jnp.asarray(gt_index, jnp.int32),
        output_size=output_size,
    )


@pytest.mark.parametrize(("cells", "output_size"), [(7, 5), (4, 9), (12, 12)])
def test_against_the_loops(cells, output_size):
    rng = np.random.default_rng(cells)
    masks = rng.integers(0, 2, (4, cells, cells))
    corners = rng.uniform(0, 40, (4, 2))
    mask_boxes = np.float32(np.concatenate([corners, corners + rng.uniform(10, 60, (4, 2))], axis=1))
    gt_index = rng.integers(0, 4, 30)
    boxes = np.float32(mask_boxes[gt_index] + rng.uniform(-12, 12, (30, 4)))
    found = crop(masks, mask_boxes, boxes, gt_index, output_size)
    assert set(np.unique(found)) == {0, 1}
    values = np.stack(
        [
            reference.mask_in_roi(masks[g], mask_boxes[g], np.float64(box), output_size)
            for g, box in zip(gt_index, boxes, strict=True)
        ]
    )
    decided = np.abs(values - 0.5) > 1e-4
    assert decided.mean() > 0.98
    np.testing.assert_array_equal(np.asarray(found)[decided], (values >= 0.5)[decided])


def test_the_objects_own_box_gives_the_mask_back():
    masks = np.random.default_rng(0).integers(0, 2, (2, 6, 6))
    mask_boxes = np.array([[3, 5, 40, 30], [10.5, 0.25, 11, 90]])
    np.testing.assert_array_equal(crop(masks, mask_boxes, mask_boxes, [0, 1], 6), masks)


def test_by_hand():
    # The object fills the left half of its box [10, 20] x [0, 10], from 10 to 15. The RoI reaches five pixels
    # further on every side, and its bins have their centres at x = 6, 8, ..., 24 and y = -4, -2, ..., 14. The
    # edges of the box belong to it.
    mask = np.array([[1, 1, 0, 0]] * 4)
    found = crop([mask], [[10, 0, 20, 10]], [[5, -5, 25, 15]], [0], 10)
    columns = [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]  # 10, 12, 14
    rows = [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]  # 0, 2, 4, 6, 8, 10
    np.testing.assert_array_equal(found[0], np.outer(rows, columns))


def test_a_disc_stays_a_disc():
    cells, output_size = 56, 28
    centres = (np.arange(cells) + 0.5) / cells * 80 - 40
    disc = np.hypot(centres[:, None], centres[None]) < 40
    box = np.array([[-30.0, -50, 45, 20]])
    found = np.asarray(crop([disc], [[-40, -40, 40, 40]], box, [0], output_size))[0]
    x = -30 + (np.arange(output_size) + 0.5) / output_size * 75
    y = -50 + (np.arange(output_size) + 0.5) / output_size * 70
    distance = np.hypot(y[:, None], x[None])
    # Cells of the mask are 10 / 7 pixels wide: the outline is known to about one of them.
    sure = np.abs(distance - 40) > 80 / cells
    np.testing.assert_array_equal(found[sure], (distance < 40)[sure])


def test_padded_rows_are_harmless():
    # A padded object has a box without size, a padded RoI has none either, and both may lie anywhere.
    masks = np.ones((2, 5, 5))
    mask_boxes = [[0, 0, 0, 0], [10, 10, 20, 20]]
    boxes = [[0, 0, 0, 0], [0, 0, 30, 30], [12, 12, 12, 12], [100, 100, 120, 130]]
    found = np.asarray(crop(masks, mask_boxes, boxes, [0, 0, 1, 1], 3))
    assert not found[:2].any()
    assert found[2].all()
    assert not found[3].any()
    eager = crop_and_resize_masks(
        *(jnp.asarray(masks, jnp.uint8), jnp.asarray(mask_boxes, jnp.float32)),
        *(jnp.asarray(boxes, jnp.float32), jnp.array([0, 0, 1, 1])),
        output_size=3,
    )
    np.testing.assert_array_equal(eager, found)
