import copy
import json

import numpy as np
import pytest

from klbox_jax.evaluation.voc import evaluate_voc
from tests.references.voc import voc_average_precision

CLASSES = {3: "cat", 7: "dog", 9: "emu"}


def _dataset(annotations, *, num_images=1, classes=CLASSES):
    return {
        "images": [{"id": 10 * i} for i in range(num_images)],
        "categories": [{"id": number, "name": name} for number, name in classes.items()],
        "annotations": annotations,
    }


def _truth(box, *, image=0, category=3, **more):
    return {"image_id": image, "category_id": category, "bbox": list(box), **more}


def _result(box, score, *, image=0, category=3):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def _random_set(seed, *, num_images=6):
    """Whole pixels, as VOC has them; ties of score and of overlap; difficult objects; no emu."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(num_images):
        for category in (3, 7):
            for _ in range(rng.integers(0, 5)):
                box = np.concatenate([rng.integers(0, 150, 2), rng.integers(8, 120, 2)])
                difficult = int(rng.random() < 0.3)
                annotations.append(
                    _truth(box.tolist(), image=10 * image, category=category, difficult=difficult)
                )
                for _ in range(rng.integers(0, 5)):
                    near = box + np.rint(rng.normal(0, 0.08, 4) * np.tile(box[2:], 2)).astype(int)
                    near[2:] = np.maximum(near[2:], 1)
                    score = float(rng.integers(1, 10)) / 10
                    results.append(_result(near.tolist(), score, image=10 * image, category=category))
    rng.shuffle(results)
    return _dataset(annotations, num_images=num_images), results


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("iou_threshold", [0.5, 0.75])
def test_agrees_with_plain_loops_over_inclusive_pixels(seed, iou_threshold):
    ground_truth, results = _random_set(seed)
    metrics = evaluate_voc(ground_truth, results, iou_threshold=iou_threshold)
    expected = [
        voc_average_precision(ground_truth, results, category=category, iou_threshold=iou_threshold)
        for category in (3, 7)
    ]
    assert voc_average_precision(ground_truth, results, category=9) is None
    for column, rule in enumerate(("AP_11_points", "AP_area")):
        by_class = metrics[f"{rule}_by_class"]
        values = [100 * pair[column] for pair in expected]
        np.testing.assert_allclose([by_class["cat"], by_class["dog"]], values, atol=1e-9)
        assert by_class["emu"] is None
        assert metrics[rule] == pytest.approx(np.mean(values))
        assert 0 < metrics[rule] < 100


def test_both_rules_by_hand():
    # Three objects; best first: hit, miss, hit. Precision 1 up to recall 1/3, then 2/3 up to 2/3, then none.
    # 11 points: 0, 0.1, 0.2, 0.3 have 1; 0.4, 0.5, 0.6 have 2/3: (4 + 2) / 11. Area: 1/3 + 2/9.
    boxes = [[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10]]
    results = [_result(boxes[0], 0.9), _result([80, 0, 9, 9], 0.8), _result(boxes[1], 0.7)]
    metrics = evaluate_voc(_dataset([_truth(box) for box in boxes]), results)
    assert metrics["AP_11_points"] == pytest.approx(100 * 6 / 11)
    assert metrics["AP_area"] == pytest.approx(100 * 5 / 9)


def test_recall_of_three_tenths_reaches_its_level():
    # Three of ten objects, no miss: the levels 0, 0.1, 0.2 and 0.3.
    boxes = [[20 * i, 0, 10, 10] for i in range(10)]
    results = [_result(box, 0.9) for box in boxes[:3]]
    metrics = evaluate_voc(_dataset([_truth(box) for box in boxes]), results)
    assert metrics["AP_11_points"] == pytest.approx(100 * 4 / 11)
    assert metrics["AP_area"] == pytest.approx(30)


def test_difficult_objects_count_neither_way():
    annotations = [_truth([0, 0, 10, 10]), _truth([50, 0, 10, 10], difficult=1)]
    results = [_result([50, 0, 10, 10], 0.9), _result([51, 0, 10, 10], 0.8), _result([0, 0, 10, 10], 0.7)]
    assert evaluate_voc(_dataset(annotations), results)["AP_area"] == 100
    # Without the field, crowds are what is ignored; with it, they are not.
    annotations[1] = _truth([50, 0, 10, 10], iscrowd=1)
    assert evaluate_voc(_dataset(annotations), results)["AP_area"] == 100
    annotations[1] = _truth([50, 0, 10, 10], iscrowd=1, difficult=0)
    # Hit, miss (claimed already), hit: 1/2 + 1/2 * 2/3.
    assert evaluate_voc(_dataset(annotations), results)["AP_area"] == pytest.approx(100 * 5 / 6)


def test_an_object_belongs_to_the_detection_that_overlaps_it_most():
    # The second detection overlaps the first object most, which is taken; that it also reaches the second
    # object does not help it. (COCO's protocol would give it the second.)
    annotations = [_truth([0, 0, 10, 10]), _truth([3, 0, 10, 10])]
    results = [_result([0, 0, 10, 10], 0.9), _result([1, 0, 10, 10], 0.8)]
    metrics = evaluate_voc(_dataset(annotations), results)
    assert metrics["AP_area"] == 50


def test_the_threshold_itself_is_enough():
    # 5 x 10 of 10 x 10: an IoU of exactly 0.5.
    metrics = evaluate_voc(_dataset([_truth([0, 0, 10, 10])]), [_result([0, 0, 5, 10], 0.5)])
    assert metrics["AP_area"] == 100


def test_ground_truth_as_detections_and_empty_sets():
    ground_truth, _ = _random_set(2)
    results = [
        _result(entry["bbox"], 0.5, image=entry["image_id"], category=entry["category_id"])
        for entry in ground_truth["annotations"]
    ]
    before = copy.deepcopy((ground_truth, results))
    metrics = evaluate_voc(ground_truth, results)
    assert (ground_truth, results) == before
    assert metrics["AP_11_points"] == pytest.approx(100)
    assert metrics["AP_area"] == pytest.approx(100)
    assert json.loads(json.dumps(metrics)) == metrics
    assert evaluate_voc(ground_truth, [])["AP_area"] == 0
    nothing = evaluate_voc(_dataset([]), [_result([0, 0, 0, 0], 0.5)])
    assert nothing["AP_area"] is None
    assert nothing["AP_11_points_by_class"] == {"cat": None, "dog": None, "emu": None}
    # A box without size overlaps nothing.
    flat = evaluate_voc(_dataset([_truth([0, 0, 0, 0])]), [_result([0, 0, 0, 0], 0.5)])
    assert flat["AP_area"] == 0


@pytest.mark.parametrize("change", [{"image_id": 77}, {"category_id": 88}, {"score": float("nan")}])
def test_unusable_results_are_refused(change):
    with pytest.raises(ValueError, match=r"results\[0\]"):
        evaluate_voc(_dataset([]), [{**_result([0, 0, 1, 1], 0.5), **change}])
