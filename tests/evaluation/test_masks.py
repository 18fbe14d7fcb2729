import json

import numpy as np
import pytest
from pycocotools import mask as pycocotools_mask

from klbox_jax.evaluation.masks import encode_masks, paste_mask
from tests.references import masks as reference


def smooth_mask(rng, cells):
    mask = rng.uniform(size=(cells + 2, cells + 2))
    mask = sum(mask[i : i + cells, j : j + cells] for i in range(3) for j in range(3)) / 9
    return np.float32(np.clip((mask - 0.5) * 4 + 0.5, 0, 1))


@pytest.mark.parametrize("cells", [5, 14])
def test_against_the_loops(cells):
    rng = np.random.default_rng(cells)
    pixels = 0
    for _ in range(12):
        mask = smooth_mask(rng, cells)
        corner = rng.uniform(-12, 25, 2)
        box = np.float32(np.concatenate([corner, corner + np.exp(rng.uniform(0, 4, 2))]))
        found = paste_mask(mask, box, height=30, width=40)
        values = reference.pasted_mask(mask, box, 30, 40)
        decided = np.abs(values - 0.5) > 1e-9
        np.testing.assert_array_equal(found[decided], (values >= 0.5)[decided])
        pixels += found.sum()
    assert pixels > 200


def test_a_full_mask_is_its_box():
    # Pixels whose centres lie inside: rows 3 and 4 (centres 3.5, 4.5), columns 10 to 37.
    found = paste_mask(np.ones((28, 28)), np.array([10.0, 2.6, 38.0, 5.4]), height=20, width=60)
    expected = np.zeros((20, 60), bool)
    expected[3:5, 10:38] = True
    np.testing.assert_array_equal(found, expected)


def test_interpolation_by_hand():
    # Two cells, 1 and 0, over eight pixels: their centres are at 2 and 6, the value is one half at 4. Pixel 3
    # has its centre at 3.5: 0.625. At the left the mask runs to zero, and has 0.625 at 0.5.
    mask = np.array([[1.0, 0.0]] * 2)
    found = paste_mask(mask, np.array([0.0, 0.0, 8.0, 8.0]), height=8, width=8)
    assert np.flatnonzero(found[4]).tolist() == [0, 1, 2, 3]
    above = paste_mask(mask, np.array([0.0, 0.0, 8.0, 8.0]), height=8, width=8, threshold=0.8)
    assert np.flatnonzero(above[4]).tolist() == [1, 2]  # 0.625, 0.875, 0.875, 0.625


@pytest.mark.parametrize(
    "box",
    [(50, 5, 60, 9), (-20, 5, -10, 9), (3, 90, 9, 99), (5, 5, 5, 9), (8, 9, 3, 2)],
    ids=["right", "left", "below", "no width", "inside out"],
)
def test_boxes_without_a_pixel(box):
    assert not paste_mask(np.ones((4, 4)), np.array(box, np.float32), height=20, width=30).any()


def test_a_box_over_the_border_is_cut():
    found = paste_mask(np.ones((4, 4)), np.array([-5.0, -5.0, 100.0, 100.0]), height=6, width=7)
    assert found.shape == (6, 7)
    assert found.all()


# pycocotools decodes by a NumPy interface of old.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_come_back():
    rng = np.random.default_rng(3)
    masks = np.stack([smooth_mask(rng, 14) for _ in range(3)])
    boxes = np.float32([[3, 4, 30, 20], [-5, 10, 9, 50], [10, 10, 10, 10]])
    encoded = encode_masks(masks, boxes, height=32, width=45)
    for entry, mask, box in zip(json.loads(json.dumps(encoded)), masks, boxes, strict=True):
        assert entry["size"] == [32, 45]
        expected = paste_mask(mask, box, height=32, width=45)
        np.testing.assert_array_equal(pycocotools_mask.decode(entry), expected)
    assert pycocotools_mask.area(encoded[0]) > 50
    assert encode_masks(np.zeros((0, 14, 14)), np.zeros((0, 4)), height=5, width=5) == []
