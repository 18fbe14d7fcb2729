import numpy as np
import pytest
from pycocotools import mask as pycocotools_mask

from klbox_jax.data.masks import parse_segmentation, rasterize, run_lengths, to_coco, to_compressed_rle
from tests.references import segmentation as reference


def _blobs(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.random(rng.integers(1, 12, 2)) < rng.uniform(0.2, 0.9)
    return np.kron(coarse, np.ones(rng.integers(1, 9, 2))).astype(bool)


def _encoded(mask):
    return pycocotools_mask.encode(np.asfortranarray(mask, np.uint8))


def _decoded(rle):
    height, width = rle["size"]
    runs = parse_segmentation(rle, height=height, width=width)
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T


def test_by_hand():
    # The square from 2 to 5 covers the pixels 2, 3 and 4; the cells of the box (0, 1, 6, 7) are pixels.
    polygons = parse_segmentation([[2, 2, 5, 2, 5, 5, 2, 5]], height=8, width=9)
    expected = np.zeros((6, 6), np.uint8)
    expected[1:4, 2:5] = 1
    box = np.array([0, 1, 6, 7], np.float32)
    np.testing.assert_array_equal(rasterize(polygons, box, mask_size=6, height=8), expected)
    # The same in run lengths: 2 columns of 8 are empty, then 2 pixels, 3 inside, 5 outside, and so on.
    runs = parse_segmentation({"size": [8, 9], "counts": [18, 3, 5, 3, 5, 3, 35]}, height=8, width=9)
    np.testing.assert_array_equal(rasterize(runs, box, mask_size=6, height=8), expected)
    # A box half as large shows its part twice as large.
    half = rasterize(runs, np.array([0, 1, 3, 4], np.float32), mask_size=6, height=8)
    np.testing.assert_array_equal(half, np.kron(expected[:3, :3], np.ones((2, 2))))


@pytest.mark.parametrize("seed", range(6))
def test_polygons_equal_the_reference(seed):
    rng = np.random.default_rng(seed)
    # Self-crossing outlines, points outside of box and image, and one that meets rows of cell centres exactly.
    polygons = [rng.uniform(-10, 60, 2 * rng.integers(3, 9)).tolist() for _ in range(rng.integers(1, 4))]
    polygons.append([10.0, 10.5, 30.0, 10.5, 30.0, 20.5, 10.0, 20.5])
    parsed = parse_segmentation(polygons, height=50, width=50)
    for box in ([0, 0, 50, 50], [3.3, 7.7, 41.9, 30.1], [20, 20, 20.5, 49]):
        box = np.array(box, np.float32)
        pairs = [np.reshape(polygon, (-1, 2)).tolist() for polygon in polygons[:-1]]
        pairs.append([[10, 10.5 + 1e-9], [30, 10.5 + 1e-9], [30, 20.5 + 1e-9], [10, 20.5 + 1e-9]])
        expected = reference.picture(lambda x, y, p=pairs: reference.covers(p, x, y), box, 17)
        drawn = rasterize(parsed, box, mask_size=17, height=50)
        np.testing.assert_array_equal(drawn, expected)
        assert drawn.dtype == np.uint8


def test_polygons_agree_with_pycocotools():
    # pycocotools draws outlines on a lattice five times as fine, so only pixels on the outline may differ.
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([32 + 20 * np.cos(angles), 32 + 20 * np.sin(angles)], axis=1)
    drawn = rasterize((circle,), np.array([0, 0, 64, 64], np.float32), mask_size=64, height=64)
    theirs = _decoded(to_compressed_rle([circle.ravel().tolist()], height=64, width=64))
    assert (drawn != theirs).sum() < 0.02 * drawn.sum()
    # 40 triangles of 20^2 sin(2 pi / 40) / 2
    assert drawn.sum() == pytest.approx(40 * 200 * np.sin(2 * np.pi / 40), rel=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_run_lengths_in_every_form(seed):
    mask = _blobs(seed)
    height, width = mask.shape
    encoded = _encoded(mask)
    runs = run_lengths(mask)
    assert runs.dtype == np.int32
    for counts in (runs.tolist(), encoded["counts"], encoded["counts"].decode()):
        value = {"size": [height, width], "counts": counts}
        np.testing.assert_array_equal(parse_segmentation(value, height=height, width=width), runs)
        compressed = to_compressed_rle(value, height=height, width=width)
        np.testing.assert_array_equal(_decoded(compressed), mask)
    assert to_coco(runs, height=height, width=width) == {"size": [height, width], "counts": runs.tolist()}
    box = np.array([0.2 * width, 0.3 * height, 0.9 * width, height], np.float32)
    expected = reference.picture(lambda x, y: mask[int(y), int(x)], box, 13)
    np.testing.assert_array_equal(rasterize(runs, box, mask_size=13, height=height), expected)


def test_long_runs_and_full_and_empty_masks():
    # Numbers of more than one and of more than three characters, and negative differences.
    mask = np.zeros((400, 300), bool)
    mask[10:390, 100:290] = True
    mask[5, 299] = True
    for full in (mask, np.ones((3, 4), bool), np.zeros((3, 4), bool), np.ones((1, 1), bool)):
        height, width = full.shape
        value = {"size": [height, width], "counts": _encoded(full)["counts"]}
        np.testing.assert_array_equal(
            parse_segmentation(value, height=height, width=width), run_lengths(full)
        )


def test_polygons_come_back_exactly():
    polygons = [[1.1, 2.25, 3.0, 2, 0.1, 7.37], [5, 5, 6, 5, 6, 6, 5, 6]]
    parsed = parse_segmentation(polygons, height=9, width=9)
    assert [polygon.shape for polygon in parsed] == [(3, 2), (4, 2)]
    assert to_coco(parsed, height=9, width=9) == polygons


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "nothing"),
        ([], "nothing"),
        ("polygon", "neither polygons nor run lengths"),
        ({}, "neither polygons nor run lengths"),
        ({"size": [4, 5]}, "neither polygons nor run lengths"),
        ([[]], "not a list of three or more points"),
        ([1, 2, 3, 4, 5, 6], "not a list of three or more points"),
        ([[1, 2, 3, 4]], "not a list of three or more points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "not a list of three or more points"),
        ([[1, 2, 3, 4, 5, "6"]], "not a number"),
        ([[1, 2, 3, 4, 5, True]], "not a number"),
        ([[1, 2, 3, 4, 5, None]], "not a number"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not finite"),
        ([[1, 2, 3, 4, 5, 10**400]], "not finite"),
        ([[1, 2, 3, 4, 5, 1e6]], "leads far out of its image"),
        ({"size": [5, 4], "counts": [0, 20]}, "another size than the image's 4 x 5"),
        ({"size": 20, "counts": [0, 20]}, "another size"),
        ({"size": [4, 5], "counts": [0, 21]}, "run lengths of 21 pixels in an image of 20"),
        ({"size": [4, 5], "counts": []}, "run lengths of 0 pixels"),
        ({"size": [4, 5], "counts": [-1, 21]}, "not whole numbers"),
        ({"size": [4, 5], "counts": [0.5, 19.5]}, "not whole numbers"),
        ({"size": [4, 5], "counts": [0, 2**64]}, "not whole numbers"),
        ({"size": [4, 5], "counts": 20}, "neither a list nor a text"),
        ({"size": [4, 5], "counts": ""}, "outside their alphabet, or none"),
        ({"size": [4, 5], "counts": "0~"}, "outside their alphabet"),
        ({"size": [4, 5], "counts": "0é"}, "outside their alphabet"),
        ({"size": [4, 5], "counts": "0P"}, "break off inside a number"),
        ({"size": [4, 5], "counts": "P" * 30 + "0"}, "break off inside a number"),
        ({"size": [4, 5], "counts": "0O"}, "negative or absurdly long"),
        ({"size": [4, 5], "counts": "0d1"}, "run lengths of 52 pixels"),
    ],
)
def test_malformed_segmentations_say_how(value, fault):
    with pytest.raises(ValueError, match=fault):
        parse_segmentation(value, height=4, width=5)
    with pytest.raises(ValueError, match=fault):
        to_compressed_rle(value, height=4, width=5)
