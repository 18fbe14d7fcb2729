import io
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from klbox_jax.data.source import DataError, Source
from klbox_jax.data.tfds_source import TfdsSource

# ymin, xmin, ymax, xmax as shares; label; difficult. Image i is 20 + i pixels high and 30 wide.
OBJECTS = [
    [],
    [((0.0, 0.5, 1.0, 1.0), 1, False)],
    [((0.5, 0.1, 1.0, 0.2), 0, True), ((0.0, 0.0, 0.5, 1.0), 2, False)],
]


class Pond(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    url_infos = None
    objects = OBJECTS
    image_ids = (7, 5, 6)
    has_ids = True

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/id": np.int64,
            "image/filename": tfds.features.Text(),
            "objects": tfds.features.Sequence(
                {
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=["fish", "ray", "shark"]),
                    "is_difficult": np.bool_,
                }
            ),
        }
        if not self.has_ids:
            del features["image/id"]
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, objects in enumerate(self.objects):
            image = io.BytesIO()
            Image.new("RGB", (30, 20 + i), (0, 0, 99)).save(image, "JPEG")
            image.seek(0)
            ids = {"image/id": self.image_ids[i]} if self.has_ids else {}
            yield (
                i,
                ids
                | {
                    "image": image,
                    "image/filename": f"{i}.jpg",
                    "objects": [
                        {"bbox": tfds.features.BBox(*box), "label": label, "is_difficult": difficult}
                        for box, label, difficult in objects
                    ],
                },
            )


class Faces(tfds.core.GeneratorBasedBuilder):
    """No detection set."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"age": np.int64}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"age": 3}


def _prepare(builder_class, folder):
    tfds.disable_progress_bar()
    builder_class(data_dir=str(folder), file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    _prepare(Pond, folder)
    return folder


def test_records_by_hand(data_dir):
    source = TfdsSource("pond", "train", data_dir=data_dir)
    assert isinstance(source, Source)
    assert (source.name, source.class_names) == ("pond/train", ("fish", "ray", "shark"))
    assert source.category_ids == (1, 2, 3)
    assert [record.image_id for record in source.records] == [7, 5, 6]
    assert [(record.height, record.width) for record in source.records] == [(20, 30), (21, 30), (22, 30)]
    empty, one, two = source.records
    assert empty.boxes.shape == (0, 4)
    np.testing.assert_allclose(one.boxes, [[15, 0, 30, 21]], rtol=1e-6)
    np.testing.assert_allclose(two.boxes, [[3, 11, 6, 22], [0, 0, 30, 11]], rtol=1e-6)
    np.testing.assert_array_equal(two.classes, [0, 2])
    np.testing.assert_array_equal(two.is_crowd, [True, False])
    assert two.file_name.endswith("pond/1.2.0/train/6")
    assert source.load_image(2).shape == (22, 30, 3)
    truth = source.coco_ground_truth()
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [0, 1, 0]
    assert [entry["category_id"] for entry in truth["annotations"]] == [2, 1, 3]


def test_versions_and_slices(data_dir):
    assert len(TfdsSource("pond:1.2.0", "train[1:]", data_dir=data_dir).records) == 2
    (data_dir / "pond" / "1.10.0").mkdir()
    try:
        # An empty folder is no version.
        assert len(TfdsSource("pond", "train", data_dir=str(data_dir)).records) == 3
    finally:
        (data_dir / "pond" / "1.10.0").rmdir()


def test_an_image_has_one_name_in_every_slice(data_dir, tmp_path, monkeypatch):
    def names(split, folder=data_dir):
        return [record.file_name for record in TfdsSource("pond", split, data_dir=folder).records]

    whole = names("train")
    assert len(set(whole)) == 3
    assert names("train[:2]") == whole[:2]
    assert names("train[-2:]") == whole[1:]
    assert names("train[67%:]") == whole[2:]
    assert names("train[2:]+train[:1]") == [whole[2], whole[0]]
    # Without ids of its own an image is known by its place.
    monkeypatch.setattr(Pond, "has_ids", False)
    _prepare(Pond, tmp_path)
    assert [name.rpartition("/")[2] for name in names("train[1:]", tmp_path)] == ["2", "3"]


def test_what_is_not_there_is_named(data_dir):
    with pytest.raises(
        DataError, match=r"lake does not exist: lake is not prepared\. Prepare it there: tfds\.b"
    ):
        TfdsSource("lake", "train", data_dir=data_dir)
    with pytest.raises(DataError, match=r"pond/2\.0\.0 does not exist"):
        TfdsSource("pond:2.0.0", "train", data_dir=data_dir)
    with pytest.raises(DataError, match=r"pond/1\.2\.0 has no split 'test'; it has train"):
        TfdsSource("pond", "test", data_dir=data_dir)
    with pytest.raises(DataError, match=r"holds no prepared version of \., but .*pond\. If"):
        TfdsSource(".", "train", data_dir=data_dir)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            "train[:3%]",
            r"the slice 'train\[:3%\]' is empty: train has 3 examples, of which it selects 0 to 0",
        ),
        ("train[2:1]", "the slice .* is empty: train has 3 examples, of which it selects 2 to 1"),
        ("train[:2]+train[0:0]", "is empty"),
        ("train[::2]", "cannot be read: .*Unrecognized split format: 'train.::2.'"),
        ("train[5:]", "cannot be read: Requested slice .* incompatible with 3 examples"),
        ("train[a:]", "cannot be read: .*Unrecognized split format"),
        ("train[:2]+valid", "has no split 'valid'; it has train"),
        ("valid[:50%]", r"has no split 'valid\[:50%\]'; it has train"),
    ],
)
def test_slices_are_answered_truthfully(data_dir, split, message):
    with pytest.raises(DataError, match=message) as caught:
        TfdsSource("pond", split, data_dir=data_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [1, 200, 65536, 131062])
def test_a_record_file_that_was_cut_short_is_named(data_dir, tmp_path, cut):
    copy = tmp_path / "pond" / "1.2.0"
    copy.mkdir(parents=True)
    for path in (data_dir / "pond" / "1.2.0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (shard,) = copy.glob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(DataError) as caught:
        TfdsSource("pond", "train", data_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"{shard} has 0 of the 3 records that were written, so it is cut short or damaged"
    )
    assert "Copy it again" in message
    assert "\n" not in message


def test_a_damaged_record_is_named_and_can_be_skipped(data_dir, tmp_path):
    copy = tmp_path / "pond" / "1.2.0"
    copy.mkdir(parents=True)
    for path in (data_dir / "pond" / "1.2.0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (shard,) = copy.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[200] ^= 255
    shard.write_bytes(bytes(content))
    with pytest.raises(
        DataError, match=r"array_record-00000-of-00001: record 1 of train cannot be read, the file"
    ):
        TfdsSource("pond", "train", data_dir=tmp_path)
    faults = []
    assert len(TfdsSource("pond", "train", data_dir=tmp_path, on_fault=faults.extend).records) < 3
    assert {fault.kind for fault in faults} == {"damaged record file"}


def test_another_format_is_refused(data_dir, tmp_path):
    copy = tmp_path / "pond" / "1.2.0"
    copy.mkdir(parents=True)
    for path in (data_dir / "pond" / "1.2.0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(
        DataError, match=r"1\.2\.0 is prepared in the format tfrecord, .* file_format='array_record'"
    ):
        TfdsSource("pond", "train", data_dir=tmp_path)


def test_sets_without_boxes_are_refused(tmp_path):
    _prepare(Faces, tmp_path)
    with pytest.raises(DataError, match=r"faces/1\.0\.0 has the features age, but not 'image' and 'objects'"):
        TfdsSource("faces", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"objects": [[], [((0.5, 0.1, 0.5, 0.2), 0, False)]]},
            r"train/5: object 1 .* without width or height",
        ),
        ({"objects": [[((0.1, 0.1, 0.2, 0.2), -1, False)]]}, r"train/7: an object has no label"),
        ({"image_ids": (7, 7, 6)}, r"the 'image/id' of train are not unique"),
        ({"image_ids": (2**60, 7, 6)}, r"the 'image/id' of train are not unique integers"),
    ],
)
def test_unusable_objects_and_ids(tmp_path, monkeypatch, changes, fault):
    for name, value in changes.items():
        monkeypatch.setattr(Pond, name, value)
    _prepare(Pond, tmp_path)
    with pytest.raises(DataError, match=fault):
        TfdsSource("pond", "train", data_dir=tmp_path)


def test_images_at_fault_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Pond, "objects", [[], [((0.5, 0.1, 0.5, 0.2), 0, False)], OBJECTS[2]])
    _prepare(Pond, tmp_path)
    faults = []
    source = TfdsSource("pond", "train", data_dir=tmp_path, on_fault=faults.extend)
    assert [fault.kind for fault in faults] == ["empty box"]
    assert [record.image_id for record in source.records] == [7, 6]
    # Rows behind it keep their images: image i is 20 + i pixels high.
    assert source.load_image(1).shape == (22, 30, 3)


def test_no_tensorflow(data_dir):
    code = (
        "import sys; from klbox_jax.data.tfds_source import TfdsSource; "
        f"s = TfdsSource('pond', 'train', data_dir={str(data_dir)!r}); s.load_image(0); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
