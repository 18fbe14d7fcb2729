import dataclasses

import cv2
import numpy as np
import pytest

from klbox_jax.data.masks import run_lengths
from klbox_jax.data.source import DataError, Record
from klbox_jax.data.transforms import (
    Placement,
    Preprocessing,
    choose_canvas,
    flip_boxes,
    make_example,
    resized_size,
)
from tests.references import placement, segmentation


def _record(height, width, boxes=(), *, box_stds=None, is_crowd=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Record(
        image_id=17,
        file_name="pond/17.jpg",
        height=height,
        width=width,
        boxes=boxes,
        classes=np.arange(len(boxes), dtype=np.int32) % 3,
        is_crowd=np.zeros(len(boxes), bool) if is_crowd is None else np.array(is_crowd),
        box_stds=None if box_stds is None else np.array(box_stds, np.float32).reshape(-1, 4),
    )


def _example(image, record, *, canvas, new_size, flip, **options):
    return make_example(image, record, Placement(canvas=canvas, new_size=new_size, flip=flip), **options)


def _preprocessing(**changes):
    settings = {
        "short_side": 60,
        "long_side": 100,
        "canvases": ((100, 64), (64, 100), (100, 100)),
        "max_gt": 5,
    }
    return Preprocessing(**{**settings, **changes})


def _noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_size_by_hand():
    # min(320 / 384, 320 / 512) = 0.625
    assert resized_size(512, 384, short_side=320, long_side=320) == (320, 240)
    # min(800 / 427, 1333 / 640) = 1.8735: 427 -> 800, 640 -> 1199.06
    assert resized_size(427, 640, short_side=800, long_side=1333) == (800, 1199)
    # A strip never loses its last row.
    assert resized_size(1, 5000, short_side=100, long_side=200) == (1, 200)


def test_size_and_canvas_equal_the_reference():
    rng = np.random.default_rng(1)
    for _ in range(300):
        height, width = rng.integers(1, 900, 2).tolist()
        size = resized_size(height, width, short_side=60, long_side=100)
        assert size == placement.resized_size(height, width, 60, 100)
        record = _record(height, width)
        canvas = choose_canvas(record, _preprocessing())
        assert canvas == placement.smallest_canvas(size, ((100, 64), (64, 100), (100, 100)))


def test_three_canvases_by_shape():
    preprocessing = _preprocessing(long_side=80, canvases=((80, 64), (64, 80), (80, 80)))
    assert choose_canvas(_record(300, 200), preprocessing) == 0
    assert choose_canvas(_record(200, 300), preprocessing) == 1
    # 60 x 60 fits all; portrait comes first of the two smallest.
    assert choose_canvas(_record(300, 300), preprocessing) == 0
    assert choose_canvas(_record(300, 300), _preprocessing(short_side=70, long_side=70)) == 2


def test_no_canvas_fits():
    with pytest.raises(
        DataError, match=r"pond/17\.jpg \(image 17\) is resized to 60 x 90 pixels.*\(\(64, 64\),\)"
    ):
        choose_canvas(_record(200, 300), _preprocessing(canvases=((64, 64),)))


def test_jitter_is_capped_by_the_canvas():
    sides = {"short_side": 60, "long_side": 100}
    assert resized_size(200, 300, **sides) == (60, 90)
    assert resized_size(200, 300, **sides, factor=0.5, canvas=(64, 100)) == (30, 45)
    # The factor 2 would give 120 x 180; a height of 64 allows 64 / 200.
    assert resized_size(200, 300, **sides, factor=2.0, canvas=(64, 100)) == (64, 96)
    rng = np.random.default_rng(2)
    for _ in range(300):
        height, width = rng.integers(1, 900, 2).tolist()
        canvas = tuple(rng.integers(1, 120, 2).tolist())
        size = resized_size(height, width, **sides, factor=float(rng.uniform(0.1, 3)), canvas=canvas)
        assert size[0] <= canvas[0]
        assert size[1] <= canvas[1]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("new_size", [(48, 60), (120, 150), (45, 61), (80, 100)])
def test_boxes_equal_the_reference_and_come_back(flip, new_size):
    rng = np.random.default_rng(3)
    corners = np.sort(rng.uniform(0, 1, (6, 2, 2)), axis=1) * [100, 80]
    boxes = corners.reshape(6, 4).astype(np.float32)
    example = _example(
        _noise(80, 100), _record(80, 100, boxes), canvas=(128, 160), new_size=new_size, flip=flip, max_gt=9
    )
    expected = [placement.placed_box(box, (80, 100), new_size, flip) for box in boxes]
    np.testing.assert_allclose(example.gt.boxes[:6], expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(example.gt.valid, [True] * 6 + [False] * 3)
    back = flip_boxes(example.gt.boxes[:6], new_size[1]) if flip else example.gt.boxes[:6]
    np.testing.assert_allclose(back / np.tile(example.scale, 2), boxes, atol=1e-4)
    # The scale is that of the rounded size, by axis: x first.
    np.testing.assert_allclose(example.scale, [new_size[1] / 100, new_size[0] / 80], rtol=1e-7)
    np.testing.assert_array_equal(example.image_size, new_size)


def test_a_box_moves_with_its_pixels():
    image = np.zeros((80, 100, 3), np.uint8)
    image[20:40, 10:30] = 255
    record = _record(80, 100, [[10, 20, 30, 40]])
    for new_size in ((40, 50), (160, 200)):
        for flip in (False, True):
            example = _example(image, record, canvas=(160, 208), new_size=new_size, flip=flip, max_gt=1)
            x1, y1, x2, y2 = example.gt.boxes[0].round().astype(int)
            bright = np.argwhere(example.images[:, :, 0] > 127)
            np.testing.assert_array_equal(bright.min(axis=0), [y1, x1])
            np.testing.assert_array_equal(bright.max(axis=0), [y2 - 1, x2 - 1])


def test_flip_twice_is_the_identity():
    image = _noise(40, 50)
    record = _record(40, 50, [[0, 1, 10, 20], [12.5, 3, 50, 40]], box_stds=[[1, 2, 3, 4], [5, 6, 7, 8]])
    settings = {"canvas": (64, 64), "new_size": (40, 50), "max_gt": 2}
    once = _example(image, record, flip=True, **settings)
    np.testing.assert_array_equal(once.gt.boxes[0], [40, 1, 50, 20])
    np.testing.assert_array_equal(once.gt.box_stds[0], [3, 2, 1, 4])
    np.testing.assert_array_equal(once.images[:40, :50], image[:, ::-1])
    flipped = dataclasses.replace(record, boxes=once.gt.boxes, box_stds=once.gt.box_stds)
    twice = _example(once.images[:40, :50], flipped, flip=True, **settings)
    plain = _example(image, record, flip=False, **settings)
    np.testing.assert_array_equal(twice.images, plain.images)
    np.testing.assert_array_equal(twice.gt.boxes, plain.gt.boxes)
    np.testing.assert_array_equal(twice.gt.box_stds, plain.gt.box_stds)


def test_stds_scale_by_axis_swap_and_have_a_floor():
    record = _record(100, 100, [[10, 10, 50, 50]], box_stds=[[2, 4, 6, 0]])
    example = _example(_noise(100, 100), record, canvas=(64, 64), new_size=(25, 50), flip=True, max_gt=2)
    # x halves and swaps, y quarters; zero becomes the floor; the padded slot is harmless.
    np.testing.assert_allclose(example.gt.box_stds, [[3, 1, 1, 1e-3], [1, 1, 1, 1]], rtol=1e-6)


def test_padding_is_zero_and_padded_slots_are_harmless():
    example = _example(
        np.full((30, 40, 3), 255, np.uint8), _record(30, 40), canvas=(64, 80), new_size=(60, 80), flip=False,
        max_gt=3,
    )  # fmt: skip
    assert (example.images[:60, :80] == 255).all()
    assert (example.images[60:] == 0).all()
    np.testing.assert_array_equal(example.gt.boxes, [[0, 0, 1, 1]] * 3)
    assert not example.gt.valid.any()
    assert not example.gt.is_crowd.any()
    assert example.gt.box_stds is None
    assert example.valid
    assert example.image_id == 17
    assert [example.image_id.dtype, example.gt.classes.dtype] == [np.int32, np.int32]


def test_tiny_boxes_stay_valid_and_crowds_stay_marked():
    record = _record(1000, 1000, [[5, 5, 5.5, 900], [1, 1, 1.001, 1.001]], is_crowd=[False, True])
    example = _example(
        _noise(1000, 1000), record, canvas=(100, 100), new_size=(100, 100), flip=False, max_gt=2
    )
    np.testing.assert_array_equal(example.gt.valid, [True, True])
    np.testing.assert_array_equal(example.gt.is_crowd, [False, True])


def test_scaled_boxes_never_leave_the_image():
    rng = np.random.default_rng(4)
    for _ in range(100):
        height, width = rng.integers(1, 700, 2).tolist()
        new_size = tuple(rng.integers(1, 100, 2).tolist())
        record = _record(height, width, [[0, 0, width, height]])
        for flip in (False, True):
            example = _example(
                np.zeros((height, width, 3), np.uint8),
                record,
                canvas=(100, 100),
                new_size=new_size,
                flip=flip,
                max_gt=1,
            )
            box, whole = example.gt.boxes[0], [0, 0, new_size[1], new_size[0]]
            np.testing.assert_allclose(box, whole, atol=1e-12)
            assert (box >= 0).all()
            assert (box <= [new_size[1], new_size[0]] * 2).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("new_size", [(40, 50), (31, 57)])
def test_masks_lie_on_the_pixels_of_their_objects(flip, new_size):
    triangle = [(5.0, 4.0), (45.0, 12.0), (14.0, 35.0)]
    ragged = np.random.default_rng(6).random((40, 50)) < 0.5
    box = [4.5, 3.25, 46, 36]
    record = dataclasses.replace(
        _record(40, 50, [box, box]), segmentations=((np.array(triangle),), run_lengths(ragged))
    )
    example = _example(
        _noise(40, 50), record, canvas=(64, 64), new_size=new_size, flip=flip, max_gt=4, mask_size=21
    )
    assert example.gt.masks.shape == (4, 21, 21)
    assert example.gt.masks.dtype == np.uint8
    assert not example.gt.masks[2:].any()

    # Each cell of the box in the canvas, taken back to the file.
    def in_file(x, y):
        x = new_size[1] - x if flip else x
        return x * 50 / new_size[1], y * 40 / new_size[0]

    def in_triangle(x, y):
        return segmentation.covers([triangle], *in_file(x, y))

    def in_ragged(x, y):
        x, y = in_file(x, y)
        return ragged[int(y), int(x)]

    for mask, box, is_covered in zip(
        example.gt.masks, example.gt.boxes, (in_triangle, in_ragged), strict=False
    ):
        np.testing.assert_array_equal(mask, segmentation.picture(is_covered, box, 21))


def test_without_a_mask_size_there_are_no_masks():
    record = dataclasses.replace(
        _record(40, 50, [[1, 1, 9, 9]]), segmentations=(run_lengths(np.ones((40, 50), bool)),)
    )
    settings = {"canvas": (64, 64), "new_size": (40, 50), "flip": False, "max_gt": 2}
    assert _example(_noise(40, 50), record, **settings).gt.masks is None
    assert _example(_noise(40, 50), record, **settings, mask_size=3).gt.masks.sum() == 9


def test_too_many_objects_name_the_image():
    with pytest.raises(DataError, match=r"pond/17\.jpg \(image 17\) has 3 objects, but max_gt is 2.*Raise"):
        _example(
            _noise(20, 20),
            _record(20, 20, [[0, 0, 5, 5]] * 3),
            canvas=(20, 20),
            new_size=(20, 20),
            flip=False,
            max_gt=2,
        )


def test_an_image_larger_than_its_canvas_is_refused():
    with pytest.raises(ValueError, match="does not fit the canvas"):
        _example(_noise(20, 20), _record(20, 20), canvas=(20, 19), new_size=(20, 20), flip=False, max_gt=2)


@pytest.mark.parametrize(("side", "new_side"), [(40, 20), (60, 20), (60, 12)])
def test_shrinking_averages_areas(side, new_side):
    # A checkerboard of single pixels becomes grey: no alias. Of 9 pixels 4 or 5 are bright, of 25 12 or 13.
    image = np.zeros((side, side, 3), np.uint8)
    image[::2, ::2] = image[1::2, 1::2] = 200
    sizes = {"canvas": (new_side, new_side), "new_size": (new_side, new_side)}
    example = _example(image, _record(side, side), **sizes, flip=False, max_gt=1)
    tolerance = 0 if side == 40 else 12
    np.testing.assert_allclose(example.images.astype(float), 100, atol=tolerance)


def test_a_slope_stays_a_slope():
    # Pixel i of the file lies on i + 0.5; so does the resized one, on its own scale, away from the rim.
    slope = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 30, axis=0).repeat(3, axis=2)
    for width in (24, 30, 40, 59, 90, 150):
        new_size = (width // 2, width)
        example = _example(slope, _record(30, 60), canvas=new_size, new_size=new_size, flip=False, max_gt=1)
        expected = 4 * ((np.arange(width) + 0.5) * 60 / width - 0.5)
        inner = slice(width // 30 + 1, -(width // 30 + 1))
        np.testing.assert_allclose(example.images[3, inner, 1], expected[inner], atol=1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("new_size", [(37, 53), (30, 43), (11, 16), (60, 64), (1, 64), (60, 1)])
def test_a_used_canvas_is_filled_whole(flip, new_size):
    image = _noise(37, 53)
    used = np.full((60, 64, 3), 77, np.uint8)
    settings = {"canvas": (60, 64), "new_size": new_size, "flip": flip, "max_gt": 1}
    example = _example(image, _record(37, 53), **settings, out=used)
    assert np.shares_memory(example.images, used)
    height, width = new_size
    area = 2 * height < 37 or 2 * width < 53
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR)
    expected = np.zeros((60, 64, 3), np.uint8)
    expected[:height, :width] = resized[:, ::-1] if flip else resized
    np.testing.assert_array_equal(used, expected)
    new = _example(image, _record(37, 53), **settings)
    np.testing.assert_array_equal(new.images, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_side": 0}, "short_side"),
        ({"short_side": 101}, "short_side <= long_side"),
        ({"canvases": ()}, "canvases"),
        ({"canvases": ((0, 64),)}, "canvases"),
        ({"max_gt": 0}, "max_gt"),
        ({"scale_jitter": (0.0, 1.0)}, "scale_jitter"),
        ({"scale_jitter": (1.2, 0.8)}, "scale_jitter"),
        ({"mask_size": -1}, "mask_size"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _preprocessing(**changes)
