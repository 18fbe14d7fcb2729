import hashlib

import ml_collections
import numpy as np
import pytest

from klbox_jax.data import build
from klbox_jax.data.build import build_calibration_source, build_source, build_train_source
from klbox_jax.data.coco import CocoSource
from klbox_jax.data.hold_out import is_held_out, split_held_out
from klbox_jax.data.source import Source
from tests import coco_folder


def config(root, **fields):
    groups = {"train_split": "train", "eval_split": "valid", "calibration_split": "", "hold_out": 0.0}
    return ml_collections.ConfigDict({"name": "coco", "root": str(root), **groups, **fields})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return coco_folder.write_folder(
        tmp_path_factory.mktemp("pond"), images_per_shape=3, splits=("train", "valid", "spare")
    )


def test_the_choice_is_a_hash_of_the_id_alone():
    # The first eight bytes of the sha256, as a number between 0 and 1.
    for image_id in (0, 7, 139, 2**40):
        place = int(hashlib.sha256(str(image_id).encode()).hexdigest()[:16], 16) / 16**16
        assert not is_held_out(image_id, place - 1e-9)
        assert is_held_out(image_id, place + 1e-9)
    held = {share: {i for i in range(20_000) if is_held_out(i, share)} for share in (0.1, 0.3)}
    assert held[0.1] < held[0.3]
    for share, ids in held.items():
        # Four standard deviations of a binomial count.
        assert abs(len(ids) - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


def test_the_two_sides_make_up_the_source(root):
    source = CocoSource(root, "train")
    kept, held = split_held_out(source, 0.5)
    assert isinstance(kept, Source)
    assert isinstance(held, Source)
    ids = [[record.image_id for record in side.records] for side in (kept, held)]
    everyone = [record.image_id for record in source.records]
    assert ids[0] == [i for i in everyone if not is_held_out(i, 0.5)]
    assert ids[1] == [i for i in everyone if is_held_out(i, 0.5)]
    assert min(map(len, ids)) > 0
    assert (kept.name, held.name) == (source.name, f"{source.name}, held out 0.5")
    assert kept.class_names == held.class_names == source.class_names
    assert kept.category_ids == source.category_ids
    whole = source.coco_ground_truth()
    for side, chosen in zip((kept, held), ids, strict=True):
        for index, record in enumerate(side.records):
            np.testing.assert_array_equal(
                side.load_image(index), source.load_image(everyone.index(record.image_id))
            )
        truth = side.coco_ground_truth()
        assert [entry["id"] for entry in truth["images"]] == chosen
        expected = [entry for entry in whole["annotations"] if entry["image_id"] in chosen]
        assert truth["annotations"] == expected
        assert truth["categories"] == whole["categories"]


@pytest.mark.parametrize(("share", "message"), [(1.5, "is not a share"), (1e-9, "keeps 0 of the")])
def test_a_share_that_is_none(root, share, message):
    with pytest.raises(ValueError, match=rf"config\.data\.hold_out = {share} {message}"):
        split_held_out(CocoSource(root, "train"), share)


def test_what_is_held_out_is_calibrated_on(root):
    whole = build_train_source(config(root))
    assert whole.name == build_source(config(root), "train").name
    halves = config(root, hold_out=0.5)
    trained = {record.file_name for record in build_train_source(halves).records}
    calibrated = {record.file_name for record in build_calibration_source(halves).records}
    assert trained.isdisjoint(calibrated)
    assert trained | calibrated == {record.file_name for record in whole.records}


def test_a_calibration_split(root):
    assert build_calibration_source(config(root, calibration_split="spare")).name == f"{root.name}/spare"
    with pytest.raises(ValueError, match="there are no images to calibrate on: set"):
        build_calibration_source(config(root))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("2007_test", r"has images of config\.data\.eval_split = '2007_test'"),
        ("2012_val+2007_trainval", r"has images of config\.data\.train_split = '2007_trainval\+2012_train'"),
    ],
)
def test_images_that_are_trained_on_or_reported_are_refused(monkeypatch, split, message):
    monkeypatch.setattr(build, "build_source", lambda *args: pytest.fail("read"))
    fields = {"train_split": "2007_trainval+2012_train", "eval_split": "2007_test"}
    with pytest.raises(ValueError, match=message):
        build_calibration_source(config("", name="voc", calibration_split=split, **fields))
