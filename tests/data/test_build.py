import ml_collections
import pytest
from PIL import Image

from klbox_jax.data import build
from klbox_jax.data.build import build_preprocessing, build_source
from klbox_jax.data.source import DataError, raise_fault
from tests import coco_folder


def _config(**fields):
    sizes = {"short_side": 80, "long_side": 96, "canvases": ((96, 96),), "max_gt": 4}
    augmentation = {"flip": True, "scale_jitter": (1.0, 1.0)}
    return ml_collections.ConfigDict({"root": "", **sizes, **augmentation, **fields})


def test_coco(tmp_path):
    root = str(coco_folder.write_folder(tmp_path, images_per_shape=1, splits=("train",)))
    assert build_source(_config(name="coco", root=root), "train").class_names == ("fish", "ray")
    with pytest.raises(DataError, match="has a malformed mask: nothing"):
        build_source(_config(name="coco", root=root, mask_size=28), "train")
    assert (
        build_source(_config(name="coco", root=root, mask_size=0), "train").records[0].segmentations is None
    )


def test_voc(tmp_path):
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_text("1")
    (tmp_path / "VOC2007/Annotations/1.xml").write_text(
        "<annotation><size><width>8</width><height>9</height></size></annotation>"
    )
    Image.new("RGB", (8, 9)).save(tmp_path / "VOC2007/JPEGImages/1.jpg")
    config = _config(name="voc", root=str(tmp_path))
    assert len(build_source(config, "2007_test").class_names) == 20
    config.class_names = ("fish",)
    assert build_source(config, "2007_test").class_names == ("fish",)
    with pytest.raises(ValueError, match="is not of the form"):
        build_source(config, "test")


class Stub:
    """Stands for a source, and remembers what sources were asked for."""

    name, class_names, category_ids, records, fingerprint = "stub", (), (), (), None
    calls = None

    def __init__(self, *args, **fields):
        self.calls.append((args, fields))

    def load_image(self, index):
        raise NotImplementedError

    def coco_ground_truth(self):
        raise NotImplementedError


def test_tfds_and_scenes_receive_their_fields(monkeypatch):
    calls = []
    monkeypatch.setattr(Stub, "calls", calls)
    monkeypatch.setattr(build, "TfdsSource", Stub)
    monkeypatch.setattr(build, "ScenesSource", Stub)
    build_source(_config(name="tfds", root="prepared", tfds_name="voc/2007"), "test")
    assert calls == [(("voc/2007", "test"), {"data_dir": "prepared", "on_fault": raise_fault})]
    config = _config(name="scenes", root="here", noise_scale=2.0, num_images={"train": 3})
    build_source(config, "train")
    build_source(config, "test")
    assert [fields["boxes"] for _, fields in calls[1:]] == ["noisy", "exact"]
    assert calls[1][1] == {"boxes": "noisy", "masks": False, "noise_scale": 2.0, "train": 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "kitti"},
            "config.data.name = 'kitti' is unknown; choose one of auto, coco, scenes, tfds, voc, yolo",
        ),
        ({"name": "coco"}, "config.data.root is empty; set it to the folder of the coco data set"),
        ({"name": "voc"}, "config.data.root is empty"),
        ({"name": "tfds"}, "config.data.root is empty"),
        ({"name": "tfds", "root": "x"}, "config.data.tfds_name is empty"),
    ],
)
def test_what_is_missing_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        build_source(_config(**fields), "train")


def test_preprocessing():
    assert build_preprocessing(_config(name="coco")).mask_size == 0
    preprocessing = build_preprocessing(_config(name="coco", mask_size=28))
    assert (preprocessing.mask_size, preprocessing.max_gt) == (28, 4)
