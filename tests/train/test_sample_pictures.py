import types

import numpy as np

from klbox_jax.data.source import DataError, Record
from klbox_jax.train.sample_pictures import LONG_SIDE, draw_samples

CLASSES = {"class_names": ("fish", "ray"), "category_ids": (3, 7)}


def make_source(*sizes, damaged=()):
    def load_image(index):
        if index in damaged:
            raise DataError("damaged")
        return np.full((*sizes[index], 3), 90, np.uint8)

    records = [
        Record(
            image_id=10 + index,
            file_name=f"{index}.png",
            height=height,
            width=width,
            boxes=np.zeros((0, 4), np.float32),
            classes=np.zeros(0, np.int32),
            is_crowd=np.zeros(0, bool),
        )
        for index, (height, width) in enumerate(sizes)
    ]
    return types.SimpleNamespace(
        name="noise",
        fingerprint=None,
        records=records,
        load_image=load_image,
        coco_ground_truth=dict,
        **CLASSES,
    )


def result(image_id, *, score=0.9, std=0.0, box=(200.0, 200.0, 400.0, 200.0)):
    return {
        "image_id": image_id,
        "category_id": 7,
        "bbox": list(box),
        "score": score,
        "bbox_std": [std] * 4,
    }


def test_images_are_spread_over_the_set_and_keep_their_names():
    source = make_source(*[(60, 80)] * 9)
    assert list(draw_samples(source, [], count=3)) == ["10", "14", "18"]
    assert list(draw_samples(source, [], count=20)) == [str(10 + index) for index in range(9)]
    assert draw_samples(source, [], count=0) == {}


def test_what_cannot_be_read_is_left_out():
    assert list(draw_samples(make_source(*[(60, 80)] * 3, damaged=(1,)), [], count=3)) == ["10", "12"]


def test_boxes_shrink_with_the_picture_and_bands_are_drawn():
    """A photograph of 1600 x 1200 is drawn at half its size, and so is the box, with edges at 100, 100, 300, 200."""
    source = make_source((1200, 1600))
    (empty,) = draw_samples(source, [], count=1).values()
    assert empty.shape == (LONG_SIDE * 3 // 4, LONG_SIDE, 3)
    (weak,) = draw_samples(source, [result(10, score=0.1)], count=1).values()
    np.testing.assert_array_equal(weak, empty)
    (elsewhere,) = draw_samples(source, [result(11)], count=1).values()
    np.testing.assert_array_equal(elsewhere, empty)

    (line,) = draw_samples(source, [result(10)], count=1).values()
    (band,) = draw_samples(source, [result(10, std=16.0)], count=1).values()
    # Away from the label, along a row through the middle: x1 = 100 with a line of two pixels in a dark rim.
    touched = np.flatnonzero((line[150] != empty[150]).any(axis=-1))
    assert touched.tolist() == [98, 99, 100, 101, 298, 299, 300, 301]
    # The std is 8 pixels here: two of them on either side of each edge.
    touched = np.flatnonzero((band[150] != empty[150]).any(axis=-1))
    assert touched.tolist() == [*range(84, 116), *range(284, 316)]


def test_a_detector_without_variances_has_no_bands():
    source = make_source((1200, 1600))
    one = result(10)
    del one["bbox_std"]
    (without,) = draw_samples(source, [one], count=1).values()
    (zero,) = draw_samples(source, [result(10)], count=1).values()
    np.testing.assert_array_equal(without, zero)
