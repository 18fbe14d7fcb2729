import numpy as np
import pytest
from PIL import Image

from klbox_jax.data.image_files import ImageRules
from klbox_jax.data.source import DataError, Source
from klbox_jax.data.yolo import YoloSource, label_path
from klbox_jax.data.yolo_config import read_yolo_config

CONFIG = """
train: images/train
val: images/val
nc: 3
names: [fish, ray, shark]
"""
LABELS = {
    # Pixels of 30 x 20: (15, 10) centre, 10 x 10 large; and one that exceeds the right edge by rounding.
    "train/a": "1 0.5 0.5 0.3333333 0.5\n\n2 0.9 0.5 0.2000001 1.0\n",
    "train/c": "0 0.1 0.1 0.5 0.1 0.5 0.9\n",
    "val/d": "",
}


def write(root, config=CONFIG, labels=LABELS, images=("train/a", "train/b", "train/c", "val/d")):
    for name in images:
        path = root / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (90, 0, 0)).save(path)
    for name, text in labels.items():
        path = root / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "data.yaml").write_text(config)
    return root


def test_records_by_hand(tmp_path):
    # A folder `images` above the root has no part in the places of the labels.
    source = YoloSource(write(tmp_path / "images" / "pond"), "train")
    assert isinstance(source, Source)
    assert (source.name, source.class_names, source.category_ids) == (
        "pond/train",
        ("fish", "ray", "shark"),
        (0, 1, 2),
    )
    first, empty, polygon = source.records
    assert [record.image_id for record in source.records] == [1, 2, 3]
    np.testing.assert_allclose(first.boxes, [[10, 5, 20, 15], [24, 0, 30, 20]], atol=1e-5)
    np.testing.assert_array_equal(first.classes, [1, 2])
    assert empty.boxes.shape == (0, 4)
    np.testing.assert_allclose(polygon.boxes, [[3, 2, 15, 18]], atol=1e-5)
    assert polygon.segmentations is None
    assert source.load_image(0).shape == (20, 30, 3)
    truth = source.coco_ground_truth()
    assert [entry["category_id"] for entry in truth["annotations"]] == [1, 2, 0]
    assert truth["categories"][0] == {"id": 0, "name": "fish"}


def test_polygons_are_masks(tmp_path):
    root = write(tmp_path, labels={"train/c": LABELS["train/c"]})
    record = YoloSource(root, "train", masks=True).records[2]
    np.testing.assert_allclose(record.segmentations[0][0], [[3, 2], [15, 2], [15, 18]])
    write(tmp_path)
    with pytest.raises(DataError, match=r"a\.txt: line 1 has a malformed mask: nothing"):
        YoloSource(root, "train", masks=True)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("path: .\ntrain: images/train\nval: images/val\nnames: {0: a, 1: b, 2: c}", ("a", "b", "c")),
        # As Roboflow writes it, for images/train in the folder itself.
        ("train: ../images/train\nval: ../images/val\nnames: ['a', 'b', 'c']", ("a", "b", "c")),
        # As Ultralytics' own sets are written, with the folder of another machine.
        ("path: /content/pond\ntrain: images/train\nval: images/val\nnames: [a, b, 7]", ("a", "b", "7")),
        ("path: ../pond\ntrain: [images/train]\nval: images/val\nnames: [a, b, c]", ("a", "b", "c")),
    ],
)
def test_spellings_of_data_yaml(tmp_path, config, names):
    source = YoloSource(write(tmp_path / "pond", config), "train")
    assert source.class_names == names
    assert len(source.records) == 3


def test_lists_of_images(tmp_path):
    root = write(tmp_path, "train: train.txt\nnames: [a, b, c]")
    (root / "train.txt").write_text("./images/train/c.jpg\nimages/train/a.jpg\n\n")
    assert [len(record.boxes) for record in YoloSource(root, "train").records] == [1, 2]
    (root / "train.txt").write_text("../../etc/passwd\n")
    with pytest.raises(DataError, match=r"train\.txt: the line '../../etc/passwd' leads out of the folder"):
        YoloSource(root, "train")


def test_labels_next_to_images(tmp_path):
    assert label_path("/set/images/images/a.jpg", "/set") == "/set/images/labels/a.txt"
    assert label_path("/images/set/train/a.b.png", "/images/set") == "/images/set/train/a.b.txt"


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (
            "train: ../../elsewhere\nnames: [a]",
            "'train' path '../../elsewhere', which leads out of the folder",
        ),
        ("train: /etc\nnames: [a]", "'train' path '/etc', which leads out of the folder"),
        ("path: ..\ntrain: other\nnames: [a]", "'train' path 'other', which does not exist"),
        ("train: images/train/../../../x\nnames: [a]", "leads out of the folder"),
        ("train: images/nowhere\nnames: [a]", "which does not exist"),
        ("train: 3\nnames: [a]", r"has \[3\] as its 'train', not a path"),
        ("names: [a]", "names no images under 'train', 'val' or 'test'"),
        ("train: images/train", "has no list 'names'"),
        ("train: images/train\nnames: []", "has no list 'names'"),
        ("train: images/train\nnames: {1: a, 2: b}", "numbers its 'names'"),
        ("train: images/train\nnames: [a, a]", "has the name 'a' for the classes 0 and 1"),
        ("train: images/train\nnames: [a, [b]]", "as the name of class 1"),
        ('train: images/train\nnames: [a, "b\\nc"]', "as the name of class 1, not a printable text"),
        ("train: images/train\nnc: 5\nnames: [a]", "says nc = 5, but names 1 classes"),
        ("train: [", "is not valid YAML"),
        ("[" * 100_000, "is not valid YAML: nested too deeply"),
        ("- " * 100_000, "is not valid YAML: nested too deeply"),
        ("a: &a [x]\nb: [*a, *a]", "has YAML aliases"),
        ("!!python/object/apply:os.system ['touch owned']", "is not valid YAML"),
        ("- a", "does not hold a mapping"),
        ("x: " + "y" * 2**18, "is absurdly large"),
    ],
)
def test_faults_of_data_yaml(tmp_path, monkeypatch, config, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    root = write(tmp_path / "pond", config)
    with pytest.raises(DataError, match=fault) as caught:
        read_yolo_config(str(root / "data.yaml"))
    assert str(root / "data.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("7 0.5 0.5 0.2 0.2", r"line 2 has class 7, but .*data\.yaml names 3 classes, 0 to 2"),
        ("-1 0.5 0.5 0.2 0.2", "has class -1"),
        ("1.5 0.5 0.5 0.2 0.2", "line 2 is '1.5 0.5 0.5 0.2 0.2', not numbers"),
        (
            "0 1.2 0.5 0.2 0.2",
            "line 2 has the coordinate 1.2, which is not a fraction of the image from 0 to 1",
        ),
        ("0 0.5 0.5 120 80", "has the coordinate 120"),
        ("0 0.5 nan 0.2 0.2", "has the coordinate nan"),
        ("0 0.5 0.5 0.2 inf", "has the coordinate inf"),
        ("0 0.5 0.5 -0.2 0.2", "has the coordinate -0.2"),
        ("0 0.5 0.5 0 0.2", "has a box without width or height"),
        ("0 0.5 0.5 0.2", "has 4 numbers, neither class x y width height nor a polygon"),
        ("0 0.1 0.2 0.3 0.4 0.5", "has 6 numbers"),
        ("fish 0.5 0.5 0.2 0.2", "not numbers"),
        ("\x1b[2J", "has 1 numbers"),
    ],
)
def test_faults_of_labels_name_file_and_line(tmp_path, line, fault):
    root = write(tmp_path, labels={"train/b": f"0 0.5 0.5 0.2 0.2\n{line}\n"})
    with pytest.raises(DataError, match=fault) as caught:
        YoloSource(root, "train")
    assert str(root / "labels/train/b.txt") in str(caught.value)
    assert str(caught.value).isprintable()
    faults = []
    source = YoloSource(root, "train", on_fault=faults.extend)
    assert len(faults) == 1
    assert [record.file_name.rpartition("/")[2] for record in source.records] == ["a.jpg", "c.jpg"]


def test_empty_boxes_can_be_skipped(tmp_path):
    root = write(tmp_path, labels={"train/b": "0 0.5 0.5 0 0.2\n1 0.5 0.5 0.2 0.2\n"})
    records = YoloSource(root, "train", skip_empty_boxes=True).records
    assert [len(record.boxes) for record in records] == [0, 1, 0]


def test_links_out_of_the_folder(tmp_path):
    root = write(tmp_path / "pond")
    outside = tmp_path / "outside.jpg"
    (root / "images/train/a.jpg").rename(outside)
    (root / "images/train/a.jpg").symlink_to(outside)
    with pytest.raises(DataError, match=r"a\.jpg is a link .* config\.data\.allow_links = True"):
        YoloSource(root, "train")
    assert len(YoloSource(root, "train", images=ImageRules(allow_links=True)).records) == 3


def test_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"has no data\.yaml"):
        YoloSource(tmp_path, "train")
    root = write(tmp_path)
    with pytest.raises(DataError, match="has no split 'test'; it has train, val"):
        YoloSource(root, "test")
    (root / "images/val/d.jpg").unlink()
    with pytest.raises(DataError, match="has no images in its 'val' path"):
        YoloSource(root, "val")
    (root / "images/train/a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.jpg is not an image"):
        YoloSource(root, "train")
