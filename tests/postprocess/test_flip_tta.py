import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.postprocess.flip_tta import concat_predictions, mirror_boxes, mirror_image, mirror_predictions
from klbox_jax.structures import BoxPredictions, Proposals
from tests.references.mirroring import boxes_in_the_image, mirrored_image

CODERS = {"corner": CornerBoxCoder(), "center": CenterBoxCoder()}


def random_predictions(seed, *, log_vars=True, slots=12, count=9):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (slots, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (slots, 2))], axis=1)
    boxes[count:] = 0
    predictions = BoxPredictions(
        class_logits=jnp.asarray(rng.normal(size=(slots, 4)), jnp.float32),
        box_deltas=jnp.asarray(rng.normal(size=(slots, 3, 4)), jnp.float32),
        box_log_vars=jnp.asarray(rng.normal(size=(slots, 3, 4)), jnp.float32) if log_vars else None,
    )
    proposals = Proposals(
        boxes=jnp.asarray(boxes, jnp.float32),
        objectness_logits=jnp.asarray(rng.normal(size=slots), jnp.float32),
        valid=jnp.arange(slots) < count,
    )
    return predictions, proposals


def test_an_image_by_hand():
    # Three columns of the image, one of padding.
    row = np.array([1, 2, 3, 9], np.uint8)
    image = jnp.asarray(np.tile(row[None, :, None], (2, 1, 3)))
    np.testing.assert_array_equal(mirror_image(image, jnp.array(3))[0, :, 0], [3, 2, 1, 9])


@pytest.mark.parametrize("width", [0, 1, 6, 7])
def test_an_image_equals_the_loops(width):
    image = np.random.default_rng(width).integers(0, 256, (4, 7, 3), np.uint8)
    mirror = jax.jit(mirror_image)
    found = mirror(jnp.asarray(image), jnp.array(width))
    np.testing.assert_array_equal(found, mirrored_image(image, width))
    np.testing.assert_array_equal(found, mirror_image(jnp.asarray(image), jnp.array(width)))
    np.testing.assert_array_equal(mirror(found, jnp.array(width)), image)


def test_boxes_by_hand():
    # In an image 100 wide, from 10 to 30 becomes from 70 to 90.
    box = jnp.array([[10.0, 5, 30, 25]])
    np.testing.assert_array_equal(mirror_boxes(box, jnp.array(100)), [[70, 5, 90, 25]])
    np.testing.assert_array_equal(mirror_boxes(mirror_boxes(box, jnp.array(100)), jnp.array(100)), box)


def test_offsets_and_log_variances_by_hand():
    predictions = BoxPredictions(
        class_logits=jnp.array([[1.0, 0]]),
        box_deltas=jnp.array([[[1.0, 2, 3, 4]]]),
        box_log_vars=jnp.array([[[-1.0, -2, -3, -4]]]),
    )
    proposals = Proposals(
        boxes=jnp.array([[10.0, 5, 30, 25]]), objectness_logits=jnp.zeros(1), valid=jnp.ones(1, bool)
    )
    found, moved = mirror_predictions(predictions, proposals, jnp.array(100), box_coder=CODERS["corner"])
    # The right edge, 3 units to the right in the mirror, is the left one 3 units to the left.
    np.testing.assert_array_equal(found.box_deltas, [[[-3, 2, -1, 4]]])
    np.testing.assert_array_equal(found.box_log_vars, [[[-3, -2, -1, -4]]])
    np.testing.assert_array_equal(moved.boxes, [[70, 5, 90, 25]])
    assert found.class_logits is predictions.class_logits
    without = predictions.replace(box_log_vars=None)
    found, _ = mirror_predictions(without, proposals, jnp.array(100), box_coder=CODERS["center"])
    np.testing.assert_array_equal(found.box_deltas, [[[-1, 2, 3, 4]]])


@pytest.mark.parametrize("coding", CODERS)
def test_decoded_boxes_equal_the_loops(coding):
    coder = CODERS[coding]
    mirror = functools.partial(mirror_predictions, box_coder=coder)
    for seed in range(3):
        predictions, proposals = random_predictions(seed, log_vars=coding == "corner")
        found, moved = jax.jit(mirror)(predictions, proposals, jnp.array(95))
        decoded = coder.decode(found.box_deltas, moved.boxes[:, None])
        arrays = [np.asarray(x, np.float64) for x in (predictions.box_deltas, proposals.boxes)]
        expected = boxes_in_the_image(coding, *arrays, 95, weights=coder.weights)
        rows = np.asarray(proposals.valid)
        np.testing.assert_allclose(np.asarray(decoded)[rows], expected[rows], rtol=1e-5, atol=1e-4)
        eager = mirror(predictions, proposals, jnp.array(95))
        for one, other in zip(jax.tree.leaves((found, moved)), jax.tree.leaves(eager), strict=True):
            np.testing.assert_array_equal(one, other)
        # Twice is not at all, up to the rounding of width - x.
        back = mirror(found, moved, jnp.array(95))
        for one, other in zip(jax.tree.leaves(back), jax.tree.leaves((predictions, proposals)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.isfinite(np.asarray(moved.boxes)).all()


def test_offsets_in_different_units_are_refused():
    predictions, proposals = random_predictions(0)
    with pytest.raises(ValueError, match=r"flip=True needs one weight for the offsets of x1 and x2"):
        mirror_predictions(
            predictions, proposals, jnp.array(95), box_coder=CornerBoxCoder((10.0, 10.0, 5.0, 10.0))
        )


def test_the_second_rows_stand_behind_the_first():
    first, second = random_predictions(1), random_predictions(2)
    boxes, proposals = concat_predictions(first, second)
    for both, one, other in (
        (boxes.box_deltas, first[0].box_deltas, second[0].box_deltas),
        (boxes.box_log_vars, first[0].box_log_vars, second[0].box_log_vars),
        (proposals.boxes, first[1].boxes, second[1].boxes),
        (proposals.objectness_logits, first[1].objectness_logits, second[1].objectness_logits),
        (proposals.valid, first[1].valid, second[1].valid),
    ):
        np.testing.assert_array_equal(both, np.concatenate([one, other]))
