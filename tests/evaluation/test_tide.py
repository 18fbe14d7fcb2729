import importlib.util

import pytest

from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.tide import ERROR_TYPES, evaluate_tide
from tests.evaluation.test_coco import dataset, random_set, result, truth

CLASSES = ((3, "cat"), (7, "dog"))
BOX = [0, 0, 50, 50]


def test_one_error_of_each_type():
    objects = [truth(BOX, image=10 * i, category=3) for i in range(5)] + [truth(BOX, image=50, category=7)]
    results = [
        result(BOX, 0.95, image=0, category=3),  # right
        result(BOX, 0.90, image=0, category=3),  # a duplicate
        result(BOX, 0.85, image=10, category=7),  # wrong class
        result([0, 0, 50, 20], 0.80, image=20, category=3),  # bad box: IoU 0.4
        result([0, 0, 50, 20], 0.75, image=30, category=7),  # both; the object is missed
        result([500, 500, 9, 9], 0.70, image=40, category=3),  # background; the object is missed
        result(BOX, 0.65, image=50, category=7),  # right
    ]
    ground_truth = dataset(objects, num_images=6, classes=CLASSES)
    errors = evaluate_tide(ground_truth, results)
    assert errors["counts"] == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 2}
    assert set(ERROR_TYPES) < set(errors)
    assert errors["AP"] == pytest.approx(evaluate_detections(ground_truth, results)["AP50"], abs=1e-6)
    # All false positives gone, or no object missed: AP is no less than what any single type can give of it.
    assert errors["FP"] >= max(errors[name] for name in ("Dupe", "Bkg"))
    assert errors["FN"] >= errors["Miss"] > 0
    cat, dog = errors["by_class"]["cat"], errors["by_class"]["dog"]
    # Alone, the class does not see objects of the other: the wrong classes of dog are background.
    assert cat["counts"] == {"Loc": 1, "Dupe": 1, "Bkg": 1, "Miss": 3}
    assert dog["counts"] == {"Loc": 0, "Dupe": 0, "Bkg": 2, "Miss": 0}
    # Of dog's three detections the last is right: precision 1/3, and 1 without the two others.
    assert dog["AP"] == pytest.approx(100 / 3)
    assert dog["Bkg"] == dog["FP"] == pytest.approx(200 / 3)


def test_numbers_are_in_per_cent_and_belong_to_ap50():
    ground_truth, results = random_set(1)
    errors = evaluate_tide(ground_truth, results)
    assert errors["AP"] == pytest.approx(evaluate_detections(ground_truth, results)["AP50"], abs=1e-6)
    assert errors["by_class"]["fox"] is None
    mean = sum(errors["by_class"][name]["AP"] for name in ("cat", "dog", "emu")) / 3
    assert mean == pytest.approx(errors["AP"])
    assert 1 < errors["FP"] <= 100 - errors["AP"]


def test_without_results_everything_is_missed():
    errors = evaluate_tide(dataset([truth(BOX)]), [])
    assert errors["AP"] == 0
    assert errors["counts"]["Miss"] == 1


def test_what_cannot_be_analysed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"results\[0\]: image_id 999 is not"):
        evaluate_tide(dataset([truth(BOX)]), [result(BOX, 0.5, image=999)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs hotcoco: pip install 'klbox-jax\[fast\]'"):
        evaluate_tide(dataset([truth(BOX)]), [])
