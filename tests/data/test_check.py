import json

import numpy as np
import pytest
from PIL import Image

from klbox_jax.data.check import main
from tests import coco_folder
from tests.data import test_yolo
from tests.data.test_voc import _annotation, _object

SQUARE = [[1, 2, 4, 2, 4, 6, 1, 6]]
ORIENTATION = 0x0112


@pytest.fixture
def root(tmp_path):
    return coco_folder.write_folder(tmp_path / "pond", images_per_shape=4, splits=("train",))


def _check(root, tmp_path, capsys, *arguments):
    """Runs the command; returns its exit status, what it printed, and the faults it wrote."""
    output = tmp_path / "out" / "check.json"
    status = main([f"--root={root}", f"--output={output}", "--num_threads=2", *arguments])
    return status, capsys.readouterr().out, json.loads(output.read_text())


def _change(root, change):
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_set_has_nothing_to_list(root, tmp_path, capsys):
    status, printed, content = _check(root, tmp_path, capsys)
    assert (status, content["faults"], content["sound_images"]) == (0, [], {"train": 12})
    assert printed.splitlines() == [
        "train: 12 sound images",
        "pond/train: 12 images (0 without annotations), 24 objects of 2 classes",
        "  by class: fish 15, ray 9",
        "  by size (root of the area, pixels): 0 to 32: 0, 32 to 96: 24, from 96: 0",
    ]


def test_every_fault_is_listed_at_once(root, tmp_path, capsys):
    # Images 1 to 12 lie in 0.png to 11.png; annotations 2 i - 1 and 2 i are of image i.
    def change(content):
        images, annotations = content["images"], content["annotations"]
        images[0]["width"] = "wide"  # image 1
        images[1]["file_name"] = "../../../etc/passwd"  # image 2
        images[2].update(height=60_000, width=60_000)  # image 3
        images[3]["height"] += 1  # image 4
        annotations[8]["bbox"] = [1, 2, 0, 4]  # image 5, ...
        annotations[9]["bbox"] = [1, 2, float("nan"), 4]  # ... twice
        annotations[10]["bbox"] = [500, 2, 3, 4]  # image 6
        annotations[12]["category_id"] = 99  # image 7
        annotations[14]["id"] = 2  # image 8
        annotations[18]["segmentation"] = [[1, 2, 3]]  # image 10; all others have one that is sound
        for entry in annotations:
            entry.setdefault("segmentation", SQUARE)
        annotations[16]["segmentation"] = []  # image 9
        annotations[22]["bbox"] = [-9, 2, 20, 20]  # image 12: no fault, it is cut

    _change(root, change)
    (root / "train" / "10.png").write_bytes((root / "train" / "10.png").read_bytes()[:-200])  # image 11
    status, printed, content = _check(root, tmp_path, capsys, "--masks", "--refuse_empty_boxes")
    assert status == 1
    faults = [(fault["severity"], fault["kind"], fault["record"]) for fault in content["faults"]]
    # An image is checked for what its entry says as far as that can be read.
    assert sorted(faults) == [
        ("error", "absurdly large image", "image 3"),
        ("error", "box outside its image", "annotation 11"),
        ("error", "damaged image", "image 11"),
        ("error", "duplicate id", "annotations[1] and annotations[14]"),
        ("error", "empty box", "annotation 9"),
        ("error", "image of another size", "image 4"),
        ("error", "malformed mask", "annotation 17 in image 9"),
        ("error", "malformed mask", "annotation 19 in image 10"),
        ("error", "path out of the image folder", "file_name '../../../etc/passwd' of image 2"),
        ("error", "unknown category_id", "annotation 13"),
        ("error", "wrong 'bbox'", "'bbox' of annotations[9] (id 10)"),
        ("error", "wrong 'width'", "'width' of images[0] (id 1)"),
        ("warning", "box over the edge of its image", "annotation 23"),
    ]
    assert content["sound_images"] == {"train": 1}
    assert all(fault["remedy"].endswith(".") and fault["what"] for fault in content["faults"])
    assert content["counts"]["error: malformed mask"] == 2
    lines = printed.splitlines()
    assert lines[0].split() == ["severity", "file", "record", "what", "remedy"]
    assert "       2  error: malformed mask" in lines
    assert lines[1 + 13 + 1 + 12 :][0] == "train: 1 sound images"
    assert len(lines) == 1 + 13 + 1 + 12 + 1 + 3


def test_a_fault_of_the_whole_file_ends_the_list(root, tmp_path, capsys):
    _change(root, lambda content: content["categories"].append({"id": 3, "name": "\ud800"}))
    status, _, content = _check(root, tmp_path, capsys)
    assert status == 1
    assert [fault["severity"] for fault in content["faults"]] == ["fatal"]
    (root / "annotations" / "instances_train.json").write_text("{")
    status, printed, content = _check(root, tmp_path, capsys, "--split=train")
    assert (status, [fault["kind"] for fault in content["faults"]]) == (1, ["unreadable annotations"])
    assert "is not valid JSON" in printed


def test_an_image_annotated_against_its_exif_is_a_warning(root, tmp_path, capsys):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for name in ("0.png", "2.png"):  # 100 x 150; and 100 x 100, where nothing can be told
        with Image.open(root / "train" / name) as image:
            image.save(root / "train" / name, exif=exif)
    status, _, content = _check(root, tmp_path, capsys)
    assert status == 1
    assert _check(root, tmp_path, capsys, "--allow_warnings")[0] == 0
    assert [(f["kind"], f["record"]) for f in content["faults"]] == [
        ("EXIF against the annotation", "image 1")
    ]


def test_what_a_terminal_might_obey_is_not_printed(root, tmp_path, capsys):
    _change(root, lambda content: content["images"][0].update(file_name="\x1b[2J.png"))
    status, printed, content = _check(root, tmp_path, capsys)
    assert status == 1
    assert "\x1b" not in printed
    assert "\x1b[2J.png" in content["faults"][0]["what"]


def test_no_more_rows_than_asked_for(root, tmp_path, capsys):
    _change(root, lambda content: [entry.update(bbox=[1, 2, 0, 0]) for entry in content["annotations"]])
    _, printed, content = _check(root, tmp_path, capsys, "--rows=3", "--refuse_empty_boxes")
    assert len(content["faults"]) == 24
    assert "... and 21 more" in printed
    faults = printed[: printed.index("pond/train: 0 images")]
    assert len(faults.splitlines()) == 1 + 3 + 1 + 1 + 1 + 1


def test_voc(tmp_path, capsys):
    root = tmp_path / "kit"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / "VOC2007" / folder).mkdir(parents=True)
    (root / "VOC2007/ImageSets/Main/test.txt").write_text("a\nb\nc\nc\nd\n")
    (root / "VOC2007/ImageSets/Main/dog_test.txt").write_text("a 1\n")
    annotations = {
        "a": _annotation(_object()),
        "b": _annotation(_object("dragon"), _object(box=(9, 1, 8, 3)), _object()),
        "d": _annotation(width=31),
    }
    for name, text in annotations.items():
        (root / f"VOC2007/Annotations/{name}.xml").write_text(text)
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / f"VOC2007/JPEGImages/{name}.jpg")
    status, _, content = _check(root, tmp_path, capsys, "--format=voc")
    assert status == 1
    assert sorted((fault["kind"], fault["record"]) for fault in content["faults"]) == [
        ("duplicate id", ""),
        ("empty box", "object 2"),
        ("image of another size", ""),
        ("unknown category_id", "object 1"),
        ("unreadable annotations", ""),
    ]
    assert content["sound_images"] == {"2007_test": 1}
    _, _, content = _check(root, tmp_path, capsys, "--format=voc", "--class_names=dog,dragon")
    assert "unknown category_id" not in {fault["kind"] for fault in content["faults"]}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--root=nowhere"],
        ["--root=."],
        ["--root=.", "--format=yolo"],
        ["--root=.", "--format=kitti"],
        ["--root=.", "--num_threads=0"],
    ],
)
def test_a_wrong_command_exits_with_two(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_split_that_is_no_split_of_voc_exits_with_two(tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([f"--root={tmp_path}", "--format=voc", "--split=test"])
    assert caught.value.code == 2


def test_the_rules_are_those_of_training(root, tmp_path, capsys):
    def change(content):
        annotations = content["annotations"]
        annotations[0]["segmentation"] = []  # boxes only beside polygons
        for entry in annotations[1:]:
            entry["segmentation"] = SQUARE
        annotations[1]["segmentation"] = [*SQUARE, [6, 6, 7, 7]]
        annotations[2]["segmentation"] = [[6, 6, 7, 7]]
        annotations[4]["bbox"] = [1, 2, 3, 0]

    _change(root, change)
    status, _, content = _check(root, tmp_path, capsys)
    assert (status, content["sound_images"]) == (1, {"train": 12})
    assert [(fault["severity"], fault["kind"]) for fault in content["faults"]] == [("warning", "empty box")]
    assert _check(root, tmp_path, capsys, "--allow_warnings")[0] == 0
    # With masks, as a training with them reads the set: image 1 lacks one, image 2 has a line.
    _, _, content = _check(root, tmp_path, capsys, "--masks")
    assert content["sound_images"] == {"train": 10}
    assert sorted(fault["kind"] for fault in content["faults"]) == [
        "empty box",
        "malformed mask",
        "malformed mask",
    ]


def test_the_rules_of_a_config(root, tmp_path, capsys):
    config = {
        "model": {"rpn": {"anchor_sizes": [[16.0], [32.0, 64.0]]}},
        "data": {
            **{"name": "coco", "root": str(root), "train_split": "train", "eval_split": "train"},
            **{"short_side": 80, "long_side": 96, "canvases": [[64, 96], [80, 80]], "max_gt": 1},
            **{"flip": True, "scale_jitter": [1.0, 1.0]},
        },
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    output = tmp_path / "check.json"
    assert main([f"--config={path}", f"--output={output}", "--num_threads=2"]) == 1
    content = json.loads(output.read_text())
    # Every image has two objects, and a third of them is upright.
    assert content["counts"] == {"error: more objects than max_gt": 12, "error: image fits no canvas": 4}
    assert content["sound_images"] == {"train": 0}
    assert [limit for limit, _ in content["statistics"]["train"]["sizes"]] == [16.0, 32.0, 64.0, None]
    config["data"] |= {"max_gt": 2, "canvases": [[96, 96]]}
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert main([f"--config={path}", "--num_threads=2"]) == 0
    assert "below IoU 0.5 with every anchor: 0" in capsys.readouterr().out


def test_a_useless_set_and_a_photograph_in_two_splits(tmp_path, capsys):
    root = coco_folder.write_folder(tmp_path / "pond", images_per_shape=1)
    (root / "valid/0.png").write_bytes((root / "train/0.png").read_bytes())
    status, printed, content = _check(root, tmp_path, capsys)
    assert status == 0
    (note,) = content["faults"]
    assert (note["severity"], note["kind"]) == ("note", "photograph in two splits")
    assert note["file"].endswith("valid/0.png")
    assert note["what"] == f"has the same pixels as {root / 'train/0.png'}"
    assert "1  note: photograph in two splits" in printed
    for split in ("train", "valid"):
        path = root / f"annotations/instances_{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    status, printed, content = _check(root, tmp_path, capsys)
    assert status == 1
    assert content["counts"]["warning: no objects"] == 2
    assert content["statistics"]["train"]["empty_images"] == 3


def test_other_layouts(tmp_path, capsys):
    root = test_yolo.write(tmp_path / "pond", labels={"train/a": "7 0.5 0.5 0.1 0.1"})
    status, printed, content = _check(root, tmp_path, capsys, "--rows=1")
    assert status == 1
    assert content["faults"][0]["record"] == "line 1"
    assert content["sound_images"] == {"train": 2, "val": 1}
    assert "has class 7, but" in printed


def test_voc_by_the_lists_it_has(tmp_path, capsys):
    root = tmp_path / "kit"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / "VOC2007" / folder).mkdir(parents=True)
    for split, name in (("train", "a b"), ("val", "c")):
        (root / f"VOC2007/ImageSets/Main/{split}.txt").write_text(name)
        (root / f"VOC2007/Annotations/{name}.xml").write_text(_annotation(_object("fish", box=(0, 1, 9, 9))))
        Image.effect_noise((30, 20), 50 + len(name)).convert("RGB").save(
            root / f"VOC2007/JPEGImages/{name}.PNG"
        )
    status, _, content = _check(root, tmp_path, capsys)
    assert status == 1
    assert content["counts"] == {"warning: first pixel": 2}
    assert content["sound_images"] == {"2007_train": 1, "2007_val": 1}
    assert "config.data.voc_first_pixel = 0" in content["faults"][0]["remedy"]
    assert _check(root, tmp_path, capsys, "--first_pixel=0")[0] == 0
