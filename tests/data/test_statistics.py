import dataclasses

import numpy as np
import pytest

from klbox_jax.data.source import DataError, Record
from klbox_jax.data.statistics import (
    check_learnable,
    compute_statistics,
    find_problems,
    find_shared_images,
    format_statistics,
)
from klbox_jax.data.transforms import Preprocessing


class Boxes:
    """Images of 100 x 200 pixels with some boxes each; all of class 0 but the last box of an image."""

    name, class_names, category_ids, fingerprint = "pond/train", ("fish", "r\u00e9y"), (1, 2), None

    def __init__(self, *images, crowds=False):
        self.records = [
            Record(
                image_id=index,
                file_name=f"{index}.png",
                height=100,
                width=200,
                boxes=np.array(boxes, np.float32).reshape(-1, 4),
                classes=np.array([0] * (len(boxes) - 1) + [1] * bool(boxes), np.int32),
                is_crowd=np.full(len(boxes), crowds),
            )
            for index, boxes in enumerate(images)
        ]

    def load_image(self, index):
        raise NotImplementedError

    def coco_ground_truth(self):
        raise NotImplementedError


def test_counts_by_hand():
    # Sizes: 10, 40, 100 pixels; half a pixel wide; inside the first pixel.
    boxes = [[0, 0, 10, 10], [0, 0, 40, 40], [50, 0, 150, 100]]
    source = Boxes(boxes, [], [[5, 5, 5.5, 20], [0.1, 0.1, 0.9, 0.9]])
    statistics = compute_statistics(source)
    assert (statistics.images, statistics.empty_images, statistics.objects, statistics.ignored) == (
        3,
        1,
        5,
        0,
    )
    assert statistics.objects_by_class == {"fish": 3, "r\u00e9y": 2}
    assert (statistics.tiny, statistics.unit_boxes) == (2, 1)
    assert statistics.sizes == [(32.0, 3), (96.0, 1), (None, 1)]
    assert statistics.far_from_anchors is None
    # Half as large on the canvas: 5, 20, 50 and less.
    preprocessing = Preprocessing(short_side=50, long_side=100, canvases=((50, 100),), max_gt=9)
    scaled = compute_statistics(source, preprocessing=preprocessing, anchor_sizes=(16.0, 32.0, 64.0))
    assert scaled.sizes == [(16.0, 3), (32.0, 1), (64.0, 1), (None, 0)]
    # 20 by 20 in 16 by 16: 256 / 400. 50 by 50 and 64 by 64: 2500 / 4096. The others are too small, or too thin.
    assert scaled.far_from_anchors == 3
    text = format_statistics(scaled)
    assert text.splitlines() == [
        "pond/train: 3 images (1 without annotations), 5 objects of 2 classes, 2 smaller than a pixel",
        "  by class: fish 3, r\\xe9y 2",
        "  by size (root of the area, pixels of the canvas): 0 to 16: 3, 16 to 32: 1, 32 to 64: 1, from 64: 0",
        "  below IoU 0.5 with every anchor: 3",
    ]


@pytest.mark.parametrize(
    ("source", "kind", "text"),
    [
        (
            Boxes([[0, 0, 9, 9]], crowds=True),
            "no objects",
            "all 1 annotations of 1 images are crowds (iscrowd = 1)",
        ),
        (Boxes([], []), "no objects", "none of its 2 images has an annotation"),
        (Boxes([[0, 0, 0.5, 0.5]]), "boxes in fractions", "multiply them by its width and height"),
        (
            Boxes([[0, 0, 9, 9], [7, 7, 7.5, 9], [3, 3, 4, 3.5]]),
            "tiny boxes",
            "2 of 3 objects with a side of less",
        ),
    ],
)
def test_a_set_that_is_useless_as_a_whole(source, kind, text):
    (problem,) = find_problems(compute_statistics(source))
    assert (problem.kind, problem.severity, problem.file) == (kind, "warning", "pond/train")
    assert text in str(problem)
    if kind == "no objects":
        with pytest.raises(DataError, match="has no object to learn") as caught:
            check_learnable(compute_statistics(source))
        assert caught.value.fault.severity == "fatal"
    else:
        check_learnable(compute_statistics(source))


def test_a_sound_set_has_no_problem():
    statistics = compute_statistics(Boxes([[0, 0, 9, 9], [7, 7, 7.5, 9]], []))
    assert find_problems(statistics) == []
    # A set of which all images were left out has their faults already.
    assert find_problems(dataclasses.replace(statistics, images=0, objects=0)) == []


def test_photographs_in_two_splits():
    digests = {
        "train": {"a": "1", "b": "2", "c": "3"},
        "valid": {"d": "2", "e": "9", "f": "1"},
        "test": {"g": "8"},
    }
    (fault,) = find_shared_images(digests)
    assert (fault.file, fault.severity) == ("d", "note")
    assert str(fault).startswith("d has the same pixels as b (and 1 more of valid are in train).")
    assert find_shared_images({"train": {"a": "1", "b": "1"}}) == []
