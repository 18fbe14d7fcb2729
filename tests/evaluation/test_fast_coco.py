import importlib.util

import pytest

from klbox_jax.evaluation import fast_coco
from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.train.job import Job
from klbox_jax.train.run_evaluation import Evaluation
from klbox_jax.train.workdir import Workdir
from tests.evaluation.test_coco import dataset, masked_set, random_set
from tests.thin import scenes_config


def both(*arguments, **options):
    return (evaluate_detections(*arguments, **options, backend=name) for name in ("pycocotools", "hotcoco"))


def assert_equal(slow, fast):
    """To 1e-9, with the same holes."""
    assert list(fast) == list(slow)
    for name, value in slow.items():
        if isinstance(value, dict):
            assert_equal(value, fast[name])
        else:
            assert fast[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("max_detections", [1, 2, 100])
def test_boxes_with_crowds_and_ties(seed, max_detections):
    slow, fast = both(*random_set(seed, num_images=8), max_detections=max_detections)
    assert 0 < slow["AP"] < 100
    assert_equal(slow, fast)


@pytest.mark.parametrize("seed", range(4))
def test_masks_in_every_form(seed):
    slow, fast = both(*masked_set(seed), iou_type="segm")
    assert 0 < slow["AP"] < 100
    assert_equal(slow, fast)


def test_nothing_found_and_nothing_to_find():
    ground_truth, results = random_set(0)
    assert_equal(*both(ground_truth, []))
    empty = dataset([], num_images=6, classes=((3, "cat"), (7, "dog"), (9, "emu"), (12, "fox")))
    assert_equal(*both(empty, results))


ID_KINDS = {
    "text": lambda number: f"image-{number:04d}",
    "negative": lambda number: number - 1000,
    "beyond 64 bits": lambda number: number + 2**70,
}


@pytest.mark.parametrize("kind", ID_KINDS)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ids_of_any_kind_give_the_same_numbers(kind, iou_type):
    truth, results = random_set(4) if iou_type == "bbox" else masked_set(1)
    expected = evaluate_detections(truth, results, iou_type=iou_type)
    rename = ID_KINDS[kind]
    renamed = dict(truth)
    renamed["images"] = [image | {"id": rename(image["id"])} for image in truth["images"]]
    renamed["categories"] = [entry | {"id": rename(entry["id"])} for entry in truth["categories"]]
    renamed["annotations"], found = (
        [
            entry | {"image_id": rename(entry["image_id"]), "category_id": rename(entry["category_id"])}
            for entry in entries
        ]
        for entries in (truth["annotations"], results)
    )
    for metrics in both(renamed, found, iou_type=iou_type):
        assert 0 < metrics["AP"] < 100
        assert_equal(expected, metrics)


def test_fields_that_the_evaluation_does_not_read_may_hold_anything():
    truth, results = random_set(5)
    expected = evaluate_detections(truth, results)
    odd = {"license": None, "width": "wide", "id_of": [1], "name": None}
    strange = truth | {
        "images": [odd | image for image in truth["images"]],
        "annotations": [entry | {"segmentation": None, "area": None} for entry in truth["annotations"]],
    }
    for metrics in both(strange, [entry | {"area": "large", "id": "a"} for entry in results]):
        assert_equal(expected, metrics)


def test_an_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="coco_backend = 'rust' is unknown; choose pycocotools or hotcoco"):
        evaluate_detections(*random_set(0), backend="rust")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs hotcoco: pip install 'klbox-jax\[fast\]'"):
        evaluate_detections(*random_set(0), backend="hotcoco")


def evaluation_of(tmp_path, backend):
    config = scenes_config("loss=smooth_l1", **{"evaluation.coco_backend": backend})
    return Evaluation(Job(config=config, workdir=Workdir(tmp_path)), {})


def test_the_config_chooses(tmp_path, monkeypatch):
    truth, results = random_set(3)
    truth["images"] = [image | {"height": 500, "width": 500} for image in truth["images"]]
    slow, fast = (evaluation_of(tmp_path, name)._score(truth, results) for name in ("pycocotools", "hotcoco"))
    assert fast["AP"] == pytest.approx(slow["AP"], abs=1e-9)
    asked = []
    monkeypatch.setattr(fast_coco, "accumulate", lambda *_, **__: asked.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation_of(tmp_path, "hotcoco")._score(truth, results)
    assert asked


def test_an_unknown_back_end_is_refused_before_anything_is_evaluated(tmp_path):
    with pytest.raises(ValueError, match=r"config\.evaluation\.coco_backend = 'rust' is unknown"):
        evaluation_of(tmp_path, "rust")
