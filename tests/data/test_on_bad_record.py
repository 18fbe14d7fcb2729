import contextlib
import json
import os

import jax
import ml_collections
import numpy as np
import pytest
from absl import logging

from klbox_jax.data import source as source_module
from klbox_jax.data.build import build_preprocessing, build_source
from klbox_jax.data.loader import check_fits, eval_batches, train_batches
from klbox_jax.data.plan import EvalPlan, TrainPlan
from klbox_jax.data.source import DataError
from tests import coco_folder
from tests.data.test_voc import _annotation, _object
from tests.data.test_voc import root as voc_root  # noqa: F401
from tests.thin import random_batch, thin_model


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: lines.append(text % values if values else text)
    )
    return lines


@pytest.fixture
def root(tmp_path):
    return coco_folder.write_folder(tmp_path / "pond", images_per_shape=4, splits=("train",))


def _config(root, **fields):
    sizes = {"short_side": 80, "long_side": 96, "canvases": ((64, 96), (96, 64), (80, 80)), "max_gt": 4}
    augmentation = {"flip": True, "scale_jitter": (0.8, 1.0)}
    return ml_collections.ConfigDict(
        {"name": "coco", "root": str(root), "on_bad_record": "skip", **sizes, **augmentation, **fields}
    )


def _damage(root):
    """Damages images 1 to 5 of 12, each in another way."""
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [1, 2, -3, 4]  # of image 1
    content["annotations"][2]["category_id"] = 99  # of image 2
    del content["images"][2]["height"]
    content["images"][3]["file_name"] = "/etc/hostname"
    path.write_text(json.dumps(content))
    (root / "train" / "4.png").unlink()


def test_images_at_fault_are_left_out_whole(root, warnings):
    _damage(root)
    with pytest.raises(DataError, match="has no 'height'"):
        build_source(_config(root, on_bad_record="stop"), "train")
    assert not warnings
    source = build_source(_config(root), "train")
    assert [record.image_id for record in source.records] == [6, 7, 8, 9, 10, 11, 12]
    assert [len(record.boxes) for record in source.records] == [2] * 7
    # What is not trained on is not evaluated either.
    truth = source.coco_ground_truth()
    assert {entry["image_id"] for entry in truth["annotations"]} == {image["id"] for image in truth["images"]}
    assert len(truth["images"]) == 7
    assert len(warnings) == 6
    for line, record in zip(
        warnings,
        ("images[2]", "annotation 3", "annotation 1", "image 4", "image 5 is unusable"),
        strict=False,
    ):
        assert line.startswith("left out: ")
        assert record in line
    assert warnings[-1] == "pond/train: images were left out for 5 faults; 7 remain"


def test_a_sound_set_is_the_same_under_both(root, warnings):
    stop, skip = (build_source(_config(root, on_bad_record=value), "train") for value in ("stop", "skip"))
    assert stop.coco_ground_truth() == skip.coco_ground_truth()
    assert not warnings


def test_both_images_of_one_id_are_left_out(root):
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["images"][1]["id"] = 1
    path.write_text(json.dumps(content))
    source = build_source(_config(root), "train")
    assert [record.image_id for record in source.records] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_no_category_is_left_out(root):
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 3, "name": "fish"}, {"id": 7, "name": "fish"}]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="have the same name 'fish'"):
        build_source(_config(root), "train")


def test_warnings_are_cut_off(root, warnings, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_WARNINGS", 3)
    for number in range(10):
        (root / "train" / f"{number}.png").unlink()
    assert len(build_source(_config(root), "train").records) == 2
    assert sum(line.startswith("left out: ") for line in warnings) == 3
    assert "lists every fault" in warnings[3]
    assert len(warnings) == 5


def test_voc(voc_root, warnings):  # noqa: F811
    (voc_root / "VOC2007/Annotations/000007.xml").write_text(_annotation(_object("dragon"), _object()))
    config = _config(voc_root, name="voc")
    source = build_source(config, "2007_trainval+2012_trainval")
    # Numbers are those of the lists, whoever is left out.
    assert [record.image_id for record in source.records] == [2, 3]
    assert "object 1 is of the unknown class 'dragon'" in warnings[0]
    (voc_root / "VOC2007/ImageSets/Main/trainval.txt").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        build_source(config, "2007_trainval")


def _batches(source, config, *, steps=9, threads=2):
    preprocessing = build_preprocessing(config)
    plan = TrainPlan(check_fits(source, preprocessing), batch_size=2, seed=0)
    iterator = train_batches(source, plan, preprocessing, steps=range(steps), num_threads=threads)
    with contextlib.closing(iterator):
        return list(iterator)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_image_that_breaks_later_leaves_its_slot_empty(root, warnings, threads):
    config = _config(root)
    source = build_source(config, "train")
    expected = _batches(source, config)
    path = root / "train" / "6.png"  # image 7
    path.write_bytes(path.read_bytes()[:300])
    batches = _batches(source, config, threads=threads)
    seen = 0
    for batch, sound in zip(batches, expected, strict=True):
        is_lost = sound.image_id == 7
        seen += is_lost.sum()
        np.testing.assert_array_equal(batch.image_id, sound.image_id)
        np.testing.assert_array_equal(batch.image_size, sound.image_size)
        np.testing.assert_array_equal(batch.valid, ~is_lost)
        assert not batch.images[is_lost].any()
        assert not batch.gt.valid[is_lost].any()
        # The others are as they would have been, to the bit.
        np.testing.assert_array_equal(batch.images[~is_lost], sound.images[~is_lost])
        for leaf, other in zip(jax.tree.leaves(batch.gt), jax.tree.leaves(sound.gt), strict=True):
            np.testing.assert_array_equal(leaf[~is_lost], other[~is_lost])
    assert seen >= 2
    assert len(warnings) == 1
    assert warnings[0].startswith(f"skipped: {path} cannot be decoded")
    with pytest.raises(DataError, match=r"6\.png cannot be decoded"):
        _batches(source, _config(root, on_bad_record="stop"), threads=threads)


def test_the_evaluation_goes_on_as_well(root, warnings):
    config = _config(root)
    source = build_source(config, "train")
    os.unlink(root / "train" / "6.png")
    preprocessing = build_preprocessing(config)
    plan = EvalPlan(check_fits(source, preprocessing), batch_size=3)
    seen = [
        number
        for batch in eval_batches(source, plan, preprocessing, num_threads=1)
        for number in batch.image_id[batch.valid].tolist()
    ]
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    # Its objects count as missed.
    assert 7 in {entry["image_id"] for entry in source.coco_ground_truth()["annotations"]}
    assert len(warnings) == 1


def test_no_loss_looks_at_an_image_that_is_not_valid():
    model, key = thin_model("loss=kl"), jax.random.key(0)
    batch = random_batch()
    batch = batch.replace(valid=np.array([True, False]))
    leaves, tree = jax.tree.flatten(batch)

    def losses(params, leaves):
        return model.apply(params, jax.tree.unflatten(tree, leaves), key, method="train_forward").losses

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda leaves: model.init(key, jax.tree.unflatten(tree, leaves), key, method="train_forward"), leaves
    )
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(leaf.dtype), shapes)
    losses = jax.jit(losses)
    expected = losses(params, leaves)
    assert all(float(value) != 0 for value in expected.values())
    images, valid = np.array(batch.images), np.array(batch.gt.valid)
    images[1], valid[1] = 0, False
    blank = batch.replace(images=images, gt=batch.gt.replace(valid=valid))
    for name, value in losses(params, jax.tree.leaves(blank)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
    nothing = batch.replace(valid=np.zeros(2, bool))
    assert all(float(value) == 0 for value in losses(params, jax.tree.leaves(nothing)).values())


def test_another_word_is_refused(root):
    with pytest.raises(ValueError, match="on_bad_record must be stop or skip, got 'drop'"):
        build_preprocessing(_config(root, on_bad_record="drop"))
