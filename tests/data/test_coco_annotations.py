import json

import numpy as np
import pytest
from absl import logging

from klbox_jax.data.coco_annotations import read_coco_annotations
from klbox_jax.data.masks import parse_segmentation
from klbox_jax.data.source import DataError

SQUARE = [[1, 2, 4, 2, 4, 6, 1, 6]]
RUNS = {"size": [20, 30], "counts": [10, 5, 585]}


def _content():
    return {
        "images": [{"id": 30, "file_name": "a.png", "height": 20, "width": 30}],
        "annotations": [
            {"id": 5, "image_id": 30, "category_id": 90, "bbox": [1, 2, 3, 4], "segmentation": SQUARE},
            {"id": 7, "image_id": 30, "category_id": 4, "bbox": [0, 10, 1, 5], "iscrowd": 1, "segmentation": RUNS},
        ],
        "categories": [{"id": 90, "name": "shark"}, {"id": 4, "name": "fish"}],
    }  # fmt: skip


def _read(tmp_path, change=lambda content: None, **options):
    content = _content()
    change(content)
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    return read_coco_annotations(str(path), **{"masks": True, "skip_empty_boxes": False, **options})


def test_segmentations_are_read_in_both_forms(tmp_path):
    annotations = _read(tmp_path)
    polygons, runs = annotations.segmentations
    np.testing.assert_array_equal(polygons[0], [[1, 2], [4, 2], [4, 6], [1, 6]])
    np.testing.assert_array_equal(runs, [10, 5, 585])
    # They are kept once.
    assert not any("segmentation" in entry for entry in annotations.annotations)
    assert annotations.has_extent.all()


def test_without_masks_their_faults_do_not_matter(tmp_path):
    def change(content):
        content["annotations"][0]["segmentation"] = "none"
        del content["annotations"][1]["segmentation"]

    assert _read(tmp_path, change, masks=False).segmentations is None


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "nothing"),
        ([], "nothing"),
        ([[1, 2, 3]], "a polygon that is not a list of three or more points"),
        ({"size": [20, 30], "counts": [600]}, "run lengths without a pixel of the object"),
        ({"size": [20, 30], "counts": [600, 0]}, "run lengths without a pixel of the object"),
        ({"size": [30, 20], "counts": [0, 600]}, "run lengths for another size than the image's 20 x 30"),
    ],
)
def test_useless_masks_name_image_and_annotation(tmp_path, value, fault):
    with pytest.raises(DataError) as caught:
        _read(tmp_path, lambda c: c["annotations"][1].update(segmentation=value))
    message = str(caught.value)
    assert f"labels.json: annotation 7 in image 30 has a malformed mask: {fault}" in message
    assert "config.data.mask_size" in message


def test_a_missing_mask_is_a_fault_and_is_counted(tmp_path):
    def change(content):
        for entry in content["annotations"]:
            del entry["segmentation"]

    with pytest.raises(
        DataError, match=r"annotation 5 in image 30 has a malformed mask: nothing \(and 1 more"
    ):
        _read(tmp_path, change)


@pytest.mark.parametrize("degenerate", [[6, 6, 7, 7], [6, 6], []])
def test_a_point_or_a_line_beside_a_polygon_covers_nothing(tmp_path, degenerate):
    polygons = _read(tmp_path, lambda c: c["annotations"][0].update(segmentation=[degenerate, *SQUARE]))
    assert [part.shape for part in polygons.segmentations[0]] == [(4, 2)]
    with pytest.raises(DataError, match=r"a polygon that is not a list of three or more points|nothing"):
        _read(tmp_path, lambda c: c["annotations"][0].update(segmentation=[degenerate]))


def test_category_names_are_unique(tmp_path):
    with pytest.raises(DataError, match=r"the categories 90 and 4 have the same name 'shark'"):
        _read(tmp_path, lambda c: c["categories"][1].update(name="shark"))


def test_boxes_without_height_are_refused_or_skipped(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))

    def flatten(content):
        content["annotations"][0].update(bbox=[1, 2, 3, 0.0])

    with pytest.raises(
        DataError, match=r"annotation 5 has a box with no positive width and height.*skip_empty"
    ):
        _read(tmp_path, flatten)
    annotations = _read(tmp_path, flatten, skip_empty_boxes=True)
    np.testing.assert_array_equal(annotations.has_extent, [False, True])
    assert len(annotations.annotations) == len(annotations.segmentations) == 2
    assert (
        "annotation 5 has a box without width or height: [1, 2, 3, 0.0] in image 30. Training" in warnings[0]
    )
    _read(tmp_path)
    assert len(warnings) == 1


def test_compressed_run_lengths_as_exporters_write_them(tmp_path):
    # 10, 5, 585 in groups of five bits: 10 = ":", 5 = "5", 585 = 9 + 32 * 18, and 18 = 18 + 32 * 0 as its
    # fifth bit is set: "Y" (9 + 32), "b" (18 + 32), "0".
    value = {"size": [20, 30], "counts": ":5Yb0"}
    runs = _read(tmp_path, lambda c: c["annotations"][1].update(segmentation=value)).segmentations[1]
    np.testing.assert_array_equal(runs, parse_segmentation(RUNS, height=20, width=30))
