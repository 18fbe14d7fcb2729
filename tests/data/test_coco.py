import contextlib
import io
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from klbox_jax.data.coco import CocoFiles, CocoSource
from klbox_jax.data.image_files import ImageRules
from klbox_jax.data.source import DataError, SkipFaulty

SHARED_DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "aquarium").is_dir(), reason="the sample photographs are not beside the repository"
)


def _content():
    return {
        "images": [
            {"id": 30, "file_name": "a.png", "height": 20, "width": 30},
            {"id": 10, "file_name": "sub/b.jpg", "height": 16, "width": 16},
            {"id": 20, "file_name": "empty.png", "height": 8, "width": 9},
        ],
        "annotations": [
            {"id": 5, "image_id": 10, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 9.5, "iscrowd": 0},
            {"id": 7, "image_id": 30, "category_id": 4, "bbox": [0.5, 1.25, 10, 5], "iscrowd": 1},
            {"id": 9, "image_id": 30, "category_id": 90, "bbox": [20, 10, 10.02, 10], "segmentation": [[1]]},
        ],
        "categories": [{"id": 90, "name": "shark"}, {"id": 4, "name": "fish"}],
    }


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pond"
    (root / "annotations").mkdir(parents=True)
    (root / "train" / "sub").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(root / "train" / "a.png")
    Image.fromarray(noise[:16, :16]).save(root / "train" / "sub" / "b.jpg")
    Image.fromarray(noise[:8, :9]).save(root / "train" / "empty.png")
    _write(root, _content())
    return root


def _write(root, content):
    (root / "annotations" / "instances_train.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


def _broken(root, change):
    content = _content()
    change(content)
    _write(root, content)
    with pytest.raises(DataError) as caught:
        CocoSource(root, "train")
    message = str(caught.value)
    assert message.startswith(str(root / "annotations" / "instances_train.json"))
    assert "\n" not in message
    return message


def test_records_by_hand(folder):
    source = CocoSource(folder, "train")
    assert source.name == "pond/train"
    # Dense classes follow the category ids.
    assert source.class_names == ("fish", "shark")
    assert source.category_ids == (4, 90)
    assert [record.image_id for record in source.records] == [30, 10, 20]
    first, second, empty = source.records
    # The second box of the first image hangs over its right edge by 0.02 pixels.
    np.testing.assert_array_equal(first.boxes, [[0.5, 1.25, 10.5, 6.25], [20, 10, 30, 20]])
    np.testing.assert_array_equal(first.classes, [0, 1])
    np.testing.assert_array_equal(first.is_crowd, [True, False])
    assert (first.height, first.width) == (20, 30)
    np.testing.assert_array_equal(second.boxes, [[1, 2, 4, 6]])
    assert second.file_name.endswith("train/sub/b.jpg")
    assert empty.boxes.shape == (0, 4)
    assert empty.classes.shape == empty.is_crowd.shape == (0,)
    assert empty.box_stds is None


def test_images_are_decoded_to_their_size(folder):
    source = CocoSource(folder, "train")
    for index, record in enumerate(source.records):
        assert source.load_image(index).shape == (record.height, record.width, 3)
    with Image.open(folder / "train" / "a.png") as image:
        np.testing.assert_array_equal(source.load_image(0), np.asarray(image))


def test_other_layouts_by_name(folder):
    (folder / "labels.json").write_text((folder / "annotations" / "instances_train.json").read_text())
    source = CocoSource(folder, "all", files=CocoFiles(annotation_file="labels.json", image_dir="train"))
    assert len(source.records) == 3


def test_a_byte_order_mark_is_no_fault(folder):
    path = folder / "annotations" / "instances_train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(CocoSource(folder, "train").records) == 3


def test_annotations_may_be_none(folder):
    content = _content()
    content["annotations"] = []
    _write(folder, content)
    assert [len(record.boxes) for record in CocoSource(folder, "train").records] == [0, 0, 0]


def test_ground_truth_keeps_ids_and_fills_what_is_missing(folder):
    source = CocoSource(folder, "train")
    truth = source.coco_ground_truth()
    assert [entry["id"] for entry in truth["annotations"]] == [5, 7, 9]
    assert [entry["area"] for entry in truth["annotations"]] == [9.5, 50, pytest.approx(100.2)]
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [0, 1, 0]
    assert truth["categories"] == [{"id": 4, "name": "fish"}, {"id": 90, "name": "shark"}]
    # A caller that writes into it, as pycocotools does, spoils nothing.
    truth["annotations"][0]["bbox"][0] = -1
    truth["images"].clear()
    assert source.coco_ground_truth()["annotations"][0]["bbox"] == [1, 2, 3, 4]
    assert len(source.coco_ground_truth()["images"]) == 3


def test_masks_follow_their_boxes(folder):
    content = _content()
    square, runs = [[1, 2, 4, 2, 4, 6.5, 1, 6]], {"size": [20, 30], "counts": [10, 5, 585]}
    for entry, segmentation in zip(content["annotations"], (square, runs, square), strict=True):
        entry["segmentation"] = segmentation
    content["annotations"][2]["bbox"][3] = 0  # Its mask goes with it.
    _write(folder, content)
    source = CocoSource(folder, "train", masks=True, skip_empty_boxes=True)
    assert [len(record.segmentations) for record in source.records] == [1, 1, 0]
    np.testing.assert_array_equal(source.records[0].segmentations[0], [10, 5, 585])
    assert source.records[1].segmentations[0][0].shape == (4, 2)
    truth = source.coco_ground_truth()
    assert [entry["segmentation"] for entry in truth["annotations"]] == [square, runs, square]
    plain = CocoSource(folder, "train", skip_empty_boxes=True)
    assert plain.records[0].segmentations is None
    assert "segmentation" not in plain.coco_ground_truth()["annotations"][0]


def _average_precision(truth):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        detections = coco.loadRes(
            [
                {"image_id": e["image_id"], "category_id": e["category_id"], "bbox": e["bbox"], "score": 0.9}
                for e in truth["annotations"]
                if not e["iscrowd"]
            ]
        )
        evaluation = COCOeval(coco, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def test_ground_truth_as_detections_is_perfect(folder):
    assert _average_precision(CocoSource(folder, "train").coco_ground_truth()) == pytest.approx(1)


def test_annotation_id_zero_is_a_match(folder):
    content = _content()
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = number
    _write(folder, content)
    truth = CocoSource(folder, "train").coco_ground_truth()
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3]
    assert _average_precision(truth) == pytest.approx(1)


def test_missing_folders_and_files(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder.*Check the path"):
        CocoSource(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"valid is not a folder"):
        CocoSource(folder, "valid")
    (folder / "valid").mkdir()
    with pytest.raises(DataError, match=r"instances_valid\.json cannot be read \(No such file"):
        CocoSource(folder, "valid")


@pytest.mark.parametrize(
    "text",
    ["{", "", "\x00", "[" * 100_000, '{"images": ' + "[" * 100_000, '{"a": ' + "1" * 5000 + "}"],
    ids=["open", "empty", "null", "deep", "deep in key", "long number"],
)
def test_what_is_not_json(folder, text):
    _write(folder, text)
    with pytest.raises(DataError, match=r"instances_train\.json is not valid JSON.*export it again"):
        CocoSource(folder, "train")


def test_bytes_that_are_not_text(folder):
    (folder / "annotations" / "instances_train.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(DataError, match="is not valid JSON"):
        CocoSource(folder, "train")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"images"'])
def test_json_that_is_no_object(folder, text):
    _write(folder, text)
    with pytest.raises(DataError, match="does not hold a JSON object"):
        CocoSource(folder, "train")


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_missing_sections(folder, section):
    assert f"has no list '{section}'" in _broken(folder, lambda c: c.pop(section))
    assert f"has no list '{section}'" in _broken(folder, lambda c: c.update({section: {"a": 1}}))
    assert f"{section}[1] is not an object" in _broken(folder, lambda c: c[section].insert(1, [3]))


def test_empty_sections(folder):
    for section in ("images", "categories"):
        message = _broken(folder, lambda c, section=section: c[section].clear())
        assert f"has an empty list '{section}'" in message


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("images", "id"),
        ("images", "file_name"),
        ("images", "height"),
        ("images", "width"),
        ("annotations", "id"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("annotations", "bbox"),
        ("categories", "id"),
        ("categories", "name"),
    ],
)
def test_missing_keys_and_wrong_types(folder, section, key):
    assert f"{section}[1]" in (message := _broken(folder, lambda c: c[section][1].pop(key)))
    assert f"has no '{key}'" in message
    for wrong in (None, [], {"deep": 1}, True, float("nan")):
        message = _broken(folder, lambda c, wrong=wrong: c[section][1].update({key: wrong}))
        assert f"'{key}' of {section}[1]" in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("images", "id", 2**53),
        ("images", "id", "30"),
        ("images", "height", 0),
        ("images", "width", -4),
        ("images", "width", 30.5),
        ("images", "file_name", ""),
        ("annotations", "bbox", [1, 2, 3]),
        ("annotations", "bbox", [1, 2, 3, "4"]),
        ("annotations", "bbox", [1, 2, 3, float("inf")]),
        ("annotations", "bbox", [1, 2, 3, 10**400]),
        ("annotations", "iscrowd", 2),
        ("annotations", "area", -1),
        ("annotations", "area", "big"),
    ],
)
def test_wrong_values(folder, section, key, value):
    message = _broken(folder, lambda c: c[section][0].update({key: value}))
    assert f"'{key}' of {section}[0]" in message
    assert len(message) < 500


def test_a_fault_is_counted_with_its_like(folder):
    def change(content):
        for entry in content["annotations"]:
            del entry["bbox"]

    message = _broken(folder, change)
    assert "annotations[0] (id 5) has no 'bbox' (and 2 more). Add" in message


def test_unknown_ids(folder):
    message = _broken(folder, lambda c: c["annotations"][1].update(image_id=31))
    assert "annotation 7 has image_id 31, which 'images' does not list" in message
    message = _broken(folder, lambda c: c["annotations"][2].update(category_id=1))
    assert "annotation 9 has category_id 1, which 'categories' does not list" in message


@pytest.mark.parametrize(("section", "value"), [("images", 30), ("annotations", 5), ("categories", 90)])
def test_duplicate_ids(folder, section, value):
    message = _broken(folder, lambda c: c[section][1].update(id=value))
    assert f"{section}[0] and {section}[1] have the same id {value}" in message


@pytest.mark.parametrize(
    ("bbox", "fault"),
    [
        ([1, 2, -1, 4], "a negative width or height"),
        ([1, 2, 3, -4], "a negative width or height"),
        ([16, 2, 3, 4], "no part inside its image"),
        ([1, 40, 3, 4], "no part inside its image"),
        ([-9, 2, 9, 4], "no part inside its image"),
        ([10, 2, 1e-9, 4], "of no width or height in float32"),
    ],
)
def test_useless_boxes_name_their_annotation(folder, bbox, fault):
    message = _broken(folder, lambda c: c["annotations"][0].update(bbox=bbox))
    assert "annotation 5 has a box" in message
    assert fault in message


def test_boxes_without_extent_are_left_to_the_evaluation(folder):
    content = _content()
    content["annotations"][1]["bbox"] = [3, 4, 5, 0]
    _write(folder, content)
    with pytest.raises(DataError, match="no positive width and height"):
        CocoSource(folder, "train")
    source = CocoSource(folder, "train", skip_empty_boxes=True)
    np.testing.assert_array_equal(source.records[0].boxes, [[20, 10, 30, 20]])
    np.testing.assert_array_equal(source.records[0].classes, [1])
    assert [entry["id"] for entry in source.coco_ground_truth()["annotations"]] == [5, 7, 9]


def test_tiny_boxes_are_kept(folder):
    content = _content()
    content["annotations"][0]["bbox"] = [1, 2, 0.5, 0.01]
    _write(folder, content)
    np.testing.assert_allclose(CocoSource(folder, "train").records[1].boxes, [[1, 2, 1.5, 2.01]])


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../train/a.png", "sub/../a.png", ".", "a\0.png", "\ud800.png"]
)
def test_file_names_that_lead_out(folder, name):
    assert "does not stay in the image folder" in _broken(
        folder, lambda c: c["images"][0].update(file_name=name)
    )


def test_links_that_lead_out(folder, tmp_path):
    outside = tmp_path / "outside.png"
    os.replace(folder / "train" / "a.png", outside)
    (folder / "train" / "a.png").symlink_to(outside)
    assert "does not stay in the image folder" in _broken(folder, lambda c: None)
    (folder / "train" / "a.png").unlink()
    (folder / "train" / "a.png").symlink_to("a.png")
    with pytest.raises(DataError, match=r"a\.png"):
        CocoSource(folder, "train")


def test_an_image_folder_may_be_a_link(folder, tmp_path):
    os.replace(folder / "train", tmp_path / "photographs")
    (folder / "train").symlink_to(tmp_path / "photographs")
    assert len(CocoSource(folder, "train").records) == 3


def test_image_faults_are_known_at_once(folder):
    (folder / "train" / "a.png").unlink()
    message = _broken(folder, lambda c: None)
    assert "image 30 is unusable" in message
    assert "a.png is missing" in message

    jpeg = folder / "train" / "sub" / "b.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-40])
    assert "a.png is missing or is not a file (and 1 more). Restore" in _broken(folder, lambda c: None)
    # Without the check the fault shows when the image is read.
    source = CocoSource(folder, "train", files=CocoFiles(images=ImageRules(check=False)))
    with pytest.raises(DataError, match=r"b\.jpg cannot be decoded, it is truncated"):
        source.load_image(1)


def test_an_image_of_another_size(folder):
    message = _broken(folder, lambda c: c["images"][2].update(height=9))
    assert "empty.png is 8 pixels high and 9 wide, its annotation says 9 high and 9 wide" in message


def test_links_can_be_allowed(folder, tmp_path):
    outside = tmp_path / "outside.png"
    os.replace(folder / "train" / "a.png", outside)
    (folder / "train" / "a.png").symlink_to(outside)
    assert "or set config.data.allow_links = True" in _broken(folder, lambda c: None)
    files = CocoFiles(images=ImageRules(allow_links=True))
    source = CocoSource(folder, "train", files=files)
    assert source.load_image(0).shape == (20, 30, 3)
    # Without a way out of the folder in the name itself.
    content = _content()
    content["images"][0]["file_name"] = "../train/a.png"
    _write(folder, content)
    with pytest.raises(DataError, match="does not stay in the image folder"):
        CocoSource(folder, "train", files=files)


def test_links_that_stay_inside_the_root_are_read(folder):
    (folder / "store").mkdir()
    os.replace(folder / "train" / "a.png", folder / "store" / "0f3c")
    (folder / "train" / "a.png").symlink_to("../store/0f3c")
    assert len(CocoSource(folder, "train").records) == 3


@pytest.mark.parametrize("on_fault", [None, SkipFaulty()])
@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ([{"id": 0, "name": "fish"}], ("fish", "shark")),
        ([{"id": 900, "name": "shark"}], ("fish", "shark")),
        ([{"id": 7, "name": "ray"}, {"id": 8, "name": "ray"}], ("fish", "ray", "shark")),
        ([{"id": 7, "name": "ray"}, {"id": 7, "name": "eel"}], ("fish", "ray", "shark")),
        ([{"id": 4, "name": "fish"}], ("fish", "shark")),
    ],
)
def test_uniqueness_is_for_categories_in_use(folder, extra, names, on_fault):
    content = _content()
    content["categories"] = extra[:1] + content["categories"] + extra[1:]
    _write(folder, content)
    source = CocoSource(folder, "train", **({} if on_fault is None else {"on_fault": on_fault}))
    assert source.class_names == names
    assert len(source.records) == 3
    assert [entry["category_id"] for entry in source.coco_ground_truth()["annotations"]] == [90, 4, 90]


@pytest.mark.parametrize(
    "name",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937",
        "deux\u00a0mots",
        "\u9b5a",
        "\U0001faa8",
        "\u00ad",
    ],
)
def test_class_names_of_all_languages(folder, name):
    content = _content()
    content["categories"][0]["name"] = name
    _write(folder, content)
    assert CocoSource(folder, "train").class_names == ("fish", name)
    # Messages show what does not print, and what may not be in a terminal's font, with escapes.
    message = _broken(folder, lambda c: [c["categories"][i].update(name=name) for i in (0, 1)])
    assert message.isprintable()
    assert ascii(name) in message


@pytest.mark.parametrize("name", ["a\u202eb", "a\u2028b", "a\x85b", "\u2066", " ", "\u00a0"])
def test_class_names_that_change_the_text_around_them(folder, name):
    assert "not a printable text" in _broken(folder, lambda c: c["categories"][0].update(name=name))


@pytest.mark.parametrize("number", [20261201115105, 2**31, -(2**40), 2**53 - 1])
def test_image_ids_beyond_32_bits(folder, number):
    content = _content()
    content["images"][0]["id"] = content["annotations"][1]["image_id"] = number
    content["annotations"][2]["image_id"] = number
    _write(folder, content)
    source = CocoSource(folder, "train")
    assert source.records[0].image_id == number
    assert [image["id"] for image in source.coco_ground_truth()["images"]] == [number, 10, 20]


@needs_shared_data
@pytest.mark.parametrize(("split", "images", "boxes"), [("train", 448, 3324), ("valid", 127, 909)])
def test_aquarium(split, images, boxes):
    source = CocoSource(SHARED_DATA / "aquarium", split)
    assert len(source.records) == images
    assert sum(len(record.boxes) for record in source.records) == boxes
    assert source.class_names == ("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray")
    assert source.load_image(0).shape == (source.records[0].height, source.records[0].width, 3)


@needs_shared_data
@pytest.mark.parametrize(("split", "images", "boxes"), [("train2017", 59, 579), ("val2017", 25, 213)])
def test_coco_mini(split, images, boxes):
    source = CocoSource(SHARED_DATA / "coco_mini", split)
    assert (len(source.records), len(source.class_names)) == (images, 80)
    assert (source.category_ids[0], source.category_ids[-1]) == (1, 90)
    assert sum(len(record.boxes) for record in source.records) == boxes
    assert any(record.is_crowd.any() for record in source.records)
    assert _average_precision(source.coco_ground_truth()) > 0.99
    for index in range(len(source.records)):
        source.load_image(index)
