import json

import ml_collections
import numpy as np
import pytest

from klbox_jax.data.build import SOURCES, build_source, build_train_source
from klbox_jax.data.layout import find_layout, resolve_split
from klbox_jax.data.source import DataError, Record, Source
from tests import coco_folder
from tests.data import test_yolo
from tests.data.test_voc import root as voc_root  # noqa: F401


def _config(root, name="auto", **fields):
    return ml_collections.ConfigDict({"name": name, "root": str(root), **fields})


def _coco(root):
    return coco_folder.write_folder(root, images_per_shape=1)


def _roboflow(root):
    """A COCO folder in Roboflow's layout: annotations and images of a split in one folder."""
    coco_folder.write_folder(root, images_per_shape=1)
    for split in ("train", "valid"):
        (root / f"annotations/instances_{split}.json").rename(root / f"{split}/_annotations.coco.json")
    (root / "annotations").rmdir()
    (root / "README.roboflow.txt").write_text("")
    return root


def _below_images(root):
    coco_folder.write_folder(root, images_per_shape=1)
    (root / "images").mkdir()
    for split in ("train", "valid"):
        (root / split).rename(root / "images" / split)
        (root / f"annotations/instances_{split}.json").rename(root / f"annotations/{split}.json")
    (root / "annotations/captions_train.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("write", "name", "description", "splits"),
    [
        (_coco, "coco", "COCO (annotations/*.json)", ["train", "valid"]),
        (_roboflow, "coco", "COCO (*/_annotations.coco.json)", ["train", "valid"]),
        (_below_images, "coco", "COCO (annotations/*.json)", ["train", "valid"]),
        (test_yolo.write, "yolo", "YOLO (data.yaml)", ["train", "val"]),
    ],
    ids=["coco", "roboflow", "below images", "yolo"],
)
def test_layouts_are_found_and_read(tmp_path, monkeypatch, write, name, description, splits):
    root = write(tmp_path / "pond")
    layout = find_layout(root)
    assert (layout.name, layout.description, list(layout.splits)) == (name, description, splits)
    lines = []
    monkeypatch.setattr(
        "klbox_jax.data.build.logging.info", lambda text, *values: lines.append(text % values)
    )
    # By the names of COCO's splits, which the configs have.
    train = build_source(_config(root), "train2017")
    assert len(train.records) == 3
    assert len(build_source(_config(root), "val2017").records) == (3 if name == "coco" else 1)
    assert f"has the layout {description}; split train for train2017" in lines[0]
    # By the reader's own name, with the folder's own names of splits.
    assert len(build_source(_config(root, name=name), splits[0]).records) == 3


def test_voc_is_found_and_its_classes_are_collected(voc_root):  # noqa: F811
    layout = find_layout(voc_root)
    assert (layout.name, list(layout.splits)) == ("voc", ["2007_test", "2007_trainval", "2012_trainval"])
    source = build_source(_config(voc_root), "2007_trainval+2012_trainval")
    assert source.class_names == ("cat", "dog", "person")
    assert build_source(_config(voc_root, class_names=("person", "dog")), "2007_trainval").class_names == (
        "person",
        "dog",
    )
    with pytest.raises(DataError, match="has no split train; it has 2007_test, 2007_trainval, 2012_trainval"):
        build_source(_config(voc_root), "train")


def test_paths_of_ones_own(tmp_path):
    root = coco_folder.write_folder(tmp_path / "pond", images_per_shape=1)
    (root / "labels").mkdir()
    (root / "photos").mkdir()
    for split in ("train", "valid"):
        (root / f"annotations/instances_{split}.json").rename(root / f"labels/{split}_v2.json")
        (root / split).rename(root / "photos" / split)
    fields = {"annotation_file": "labels/{split}_v2.json", "image_dir": "photos/{split}"}
    for name in ("coco", "auto"):
        assert len(build_source(_config(root, name, **fields), "valid").records) == 3
    absolute = {key: str(root / value) for key, value in fields.items()}
    assert len(build_source(_config(tmp_path, "coco", **absolute), "valid").records) == 3


def test_an_unknown_layout_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError) as caught:
        find_layout(tmp_path)
    message = str(caught.value)
    for text in ("annotations/instances_*.json", "_annotations.coco.json", "ImageSets/Main", "data.yaml"):
        assert text in message
    assert "found notes.txt, photos. Set config.data.annotation_file" in message
    coco_folder.write_folder(tmp_path / "photos" / "pond", images_per_shape=1)
    with pytest.raises(DataError, match=r"Set config\.data\.root to its folder pond, which has one of them"):
        find_layout(tmp_path / "photos")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        find_layout(tmp_path / "nowhere")


def test_another_layout_than_the_config_says(tmp_path):
    root = test_yolo.write(tmp_path)
    with pytest.raises(
        DataError, match=r"not in COCO's layout but in that of YOLO \(data\.yaml\); set .* 'yolo'"
    ):
        build_source(_config(root, "coco"), "train")


@pytest.mark.parametrize(
    ("split", "splits", "found"),
    [
        ("train2017", ["test", "train", "valid"], "train"),
        ("validation", ["train", "val"], "val"),
        ("2007_test", ["train", "valid"], "valid"),
        ("val", ["train", "test"], "test"),
        ("spare", ["spare", "train"], "spare"),
        ("a+b", ["a", "b"], "a+b"),
    ],
)
def test_splits_by_their_kind(split, splits, found):
    assert resolve_split(split, splits, root="pond") == found


@pytest.mark.parametrize(
    ("split", "splits"), [("train", ["val", "test"]), ("spare", ["train"]), ("val", ["val2014", "val2017"])]
)
def test_splits_that_are_not_there(split, splits):
    with pytest.raises(DataError, match=f"pond has no split {split}; it has {', '.join(splits)}"):
        resolve_split(split, splits, root="pond")


class Mine:
    """A data set of a user's own file."""

    name, class_names, category_ids, fingerprint = "mine", ("fish",), (1,), None

    def __init__(self, config, split):
        boxes = np.array([[1, 2, 20, 18]] * config.count, np.float32).reshape(-1, 4)
        classes, is_crowd = np.zeros(config.count, np.int32), np.zeros(config.count, bool)
        self.records = [
            Record(
                image_id=1,
                file_name=f"{split}/1",
                height=20,
                width=30,
                boxes=boxes,
                classes=classes,
                is_crowd=is_crowd,
            )
        ]

    def load_image(self, index):
        return np.zeros((20, 30, 3), np.uint8)

    def coco_ground_truth(self):
        return {}


def test_a_data_set_of_ones_own_needs_no_change_of_the_package():
    sources = SOURCES | {"mine": Mine}
    config = ml_collections.ConfigDict({"name": "mine", "count": 2, "train_split": "all"})
    source = build_train_source(config, sources)
    assert isinstance(source, Source)
    assert (source.name, len(source.records[0].boxes)) == ("mine", 2)
    with pytest.raises(ValueError, match=r"config\.data\.name = 'mine' is unknown; choose one of auto, coco"):
        build_source(config, "all")
    config.count = 0
    assert len(build_source(config, "all", sources).records) == 1
    with pytest.raises(DataError, match="mine has no object to learn"):
        build_train_source(config, sources)


def test_a_training_set_without_an_object_to_learn(tmp_path, monkeypatch):
    root = coco_folder.write_folder(tmp_path, images_per_shape=1)
    path = root / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    path.write_text(json.dumps(content))
    warnings = []
    monkeypatch.setattr(
        "klbox_jax.data.build.logging.warning", lambda text, *values: warnings.append(text % values)
    )
    config = _config(root, "coco", train_split="train", eval_split="train")
    build_source(config, "train")
    assert "has no object to learn or to evaluate: all 6 annotations of 3 images are crowds" in warnings[0]
    with pytest.raises(
        DataError, match="Set iscrowd to 0 for single objects; some tools write 1 for every mask"
    ):
        build_train_source(config)
