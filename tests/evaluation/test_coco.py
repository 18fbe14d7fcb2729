import copy
import json

import numpy as np
import pytest
from pycocotools import mask as pycocotools_mask

from klbox_jax.data.masks import run_lengths
from klbox_jax.evaluation.coco import evaluate_detections, to_coco_results
from klbox_jax.structures import Detections
from tests.references.average_precision import average_precision


def dataset(annotations, *, num_images=1, classes=((1, "cat"),)):
    annotations = [{"iscrowd": 0, "id": i + 1, **a} for i, a in enumerate(annotations)]
    return {
        "images": [{"id": 10 * i} for i in range(num_images)],
        "categories": [{"id": i, "name": name} for i, name in classes],
        "annotations": annotations,
    }


def truth(box, *, image=0, category=1, **more):
    return {"image_id": image, "category_id": category, "bbox": list(box), **more}


def result(box, score, *, image=0, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def random_set(seed, *, num_images=6, classes=((3, "cat"), (7, "dog"), (9, "emu"), (12, "fox"))):
    """Clusters of detections around objects, with crowds, ties, and a class (fox) without objects."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(num_images):
        for category, _ in classes:
            for _ in range(rng.integers(0, 6)):
                box = np.concatenate([rng.uniform(0, 150, 2), rng.uniform(8, 120, 2)])
                is_crowd = int(rng.random() < 0.2)
                if category != 12:
                    annotations.append(
                        truth(box.tolist(), image=10 * image, category=category, iscrowd=is_crowd)
                    )
                for _ in range(rng.integers(0, 5)):
                    near = box + rng.normal(0, 0.06, 4) * np.tile(box[2:], 2)
                    near[2:] = np.maximum(near[2:], 1.0)
                    # One decimal: many ties.
                    score = float(rng.integers(1, 10)) / 10
                    results.append(result(near.tolist(), score, image=10 * image, category=category))
    rng.shuffle(results)
    return dataset(annotations, num_images=num_images, classes=classes), results


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_detections", [2, 100])
def test_agrees_with_plain_loops(seed, max_detections):
    ground_truth, results = random_set(seed)
    metrics = evaluate_detections(ground_truth, results, max_detections=max_detections)
    ap, recall = average_precision(ground_truth, results, max_detections=max_detections)
    assert 0 < metrics["AP"] < 100
    np.testing.assert_allclose(metrics["AP_by_iou"], 100 * np.nanmean(ap, axis=0), atol=1e-9)
    np.testing.assert_allclose(metrics["AP"], 100 * np.nanmean(ap), atol=1e-9)
    np.testing.assert_allclose(metrics[f"AR{max_detections}"], 100 * np.nanmean(recall), atol=1e-9)
    by_class = list(metrics["AP_by_class"].values())
    np.testing.assert_allclose(by_class[:3], 100 * ap[:3].mean(axis=1), atol=1e-9)
    assert metrics["AP_by_class"]["fox"] is None


def test_recall_limits_follow_max_detections():
    ground_truth, results = random_set(0)
    assert {key for key in evaluate_detections(ground_truth, results) if key.startswith("AR")} == {
        "AR1",
        "AR10",
        "AR100",
    }
    few = evaluate_detections(ground_truth, results, max_detections=5)
    assert {key for key in few if key.startswith("AR")} == {"AR1", "AR5"}
    _, recall = average_precision(ground_truth, results, max_detections=1)
    np.testing.assert_allclose(few["AR1"], 100 * np.nanmean(recall), atol=1e-9)


def test_named_thresholds_are_the_ones_they_name():
    # Ten objects found at IoU 0.97, 0.92, ..., 0.52, best first: at 0.50 all ten count, at 0.55 nine, ...,
    # so precision is 1 up to recall 1.0, 0.9, ..., and AP (101 levels) about 100, 90, ...
    objects = [[0, 200 * i, 100, 100] for i in range(10)]
    found = [[0, 200 * i, 100, 97 - 5 * i] for i in range(10)]
    results = [result(box, 0.9 - 0.05 * i) for i, box in enumerate(found)]
    metrics = evaluate_detections(dataset([truth(box) for box in objects]), results)
    for percent, expected in ((50, 100), (60, 80), (70, 60), (75, 50), (80, 40), (90, 20)):
        assert metrics[f"AP{percent}"] == pytest.approx(expected, abs=1.0)
    assert metrics["AP_by_iou"] == pytest.approx(np.arange(100, 0, -10), abs=1.0)


def test_ap90_is_neither_missing_nor_ap95():
    # IoU of 0.92: found at nine of the ten thresholds, so AP 90.
    ground_truth = dataset([truth([0, 0, 100, 100])])
    metrics = evaluate_detections(ground_truth, [result([0, 0, 100, 92], 0.9)])
    assert metrics["AP90"] == 100
    assert metrics["AP_by_iou"] == [100] * 9 + [0]
    assert metrics["AP"] == 90


def test_half_the_objects_by_hand():
    # Two objects; best first: a miss, then a hit. Precision is 1/2 up to recall 1/2 (levels 0, 0.01, ...,
    # 0.50: 51 of 101) and 0 beyond: 100 * 51 / 202.
    ground_truth = dataset([truth([0, 0, 10, 10]), truth([50, 50, 10, 10])])
    metrics = evaluate_detections(ground_truth, [result([80, 0, 9, 9], 0.9), result([0, 0, 10, 10], 0.8)])
    assert metrics["AP"] == pytest.approx(100 * 51 / 202)
    assert metrics["AR1"] == 0
    assert metrics["AR100"] == 50


def test_ground_truth_as_detections_is_perfect():
    ground_truth, _ = random_set(2)
    results = [
        result(a["bbox"], 0.5, image=a["image_id"], category=a["category_id"])
        for a in ground_truth["annotations"]
        if not a["iscrowd"]
    ]
    metrics = evaluate_detections(ground_truth, results)
    assert metrics["AP"] == 100
    assert metrics["AR100"] == 100
    assert metrics["AP_by_iou"] == [100] * 10
    assert metrics["AP_by_class"] == {"cat": 100, "dog": 100, "emu": 100, "fox": None}
    # One object alone is where the evaluator's epsilon would show.
    single = evaluate_detections(dataset([truth([1, 1, 5, 5])]), [result([1, 1, 5, 5], 0.1)])
    assert single["AP"] == 100


def test_sizes_use_the_annotated_area():
    # Boxes of 900 (small), 3600 (medium), 10000 (large) pixels; the small box is declared to be medium.
    boxes = [[0, 0, 30, 30], [100, 0, 60, 60], [200, 0, 100, 100]]
    ground_truth = dataset([truth(boxes[0], area=2000), truth(boxes[1]), truth(boxes[2])])
    metrics = evaluate_detections(ground_truth, [result(boxes[0], 0.9), result(boxes[1], 0.8)])
    assert metrics["AP_small"] is None
    assert metrics["AP_medium"] == 100
    assert metrics["AP_large"] == 0


def test_no_results():
    metrics = evaluate_detections(dataset([truth([0, 0, 10, 10])]), [])
    assert metrics["AP"] == 0
    assert metrics["AP90"] == 0
    assert metrics["AP_by_iou"] == [0] * 10
    assert metrics["AP_by_class"] == {"cat": 0}


def test_no_ground_truth():
    metrics = evaluate_detections(dataset([]), [result([0, 0, 1, 1], 0.5)])
    assert metrics["AP"] is None
    assert metrics["AP_by_iou"] == [None] * 10
    assert json.loads(json.dumps(metrics)) == metrics


def test_annotation_ids_do_not_matter():
    # pycocotools alone never matches an annotation with id 0, and merges those that share an id.
    annotations = [truth([0, 0, 10, 10], id=0), truth([50, 0, 10, 10], id=0)]
    results = [result([0, 0, 10, 10], 0.9), result([50, 0, 10, 10], 0.8)]
    assert evaluate_detections(dataset(annotations), results)["AP"] == 100


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_the_size_of_a_result_is_that_of_its_box(backend):
    # A large object is found exactly; a small false detection has a better score. By its own box the false one is
    # small, so it does not count among the large ones, whatever area a foreign file gives.
    ground_truth = dataset([truth([0, 0, 100, 100])])
    results = [
        {**result([500, 500, 10, 10], 0.9), "area": 100_000.0},
        {**result([0, 0, 100, 100], 0.8), "area": 4.0},
    ]
    assert evaluate_detections(ground_truth, results, backend=backend)["AP_large"] == 100


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_an_annotation_without_area_has_that_of_its_box(backend):
    ground_truth = dataset([truth([0, 0, 40, 40], area=None, iscrowd=None), truth([50, 50, 9, 9], area=2000)])
    metrics = evaluate_detections(ground_truth, [result([0, 0, 40, 40], 0.9)], backend=backend)
    assert metrics["AP_small"] is None
    assert metrics["AP_medium"] == pytest.approx(100 * 51 / 101)  # one of two
    for area in ("12", float("nan")):
        ground_truth["annotations"][1]["area"] = area
        with pytest.raises(ValueError, match=r"annotations\[1\]: area must be a finite number or null, not"):
            evaluate_detections(ground_truth, [], backend=backend)


def test_annotations_need_neither_area_nor_crowd_flag():
    ground_truth = dataset([truth([0, 0, 10, 10])])
    del ground_truth["annotations"][0]["iscrowd"]
    assert evaluate_detections(ground_truth, [result([0, 0, 10, 10], 0.9)])["AP_small"] == 100


def test_categories_of_one_name_stay_apart():
    ground_truth = dataset([truth([0, 0, 9, 9])], classes=((1, "cat"), (2, "cat"), (3, "dog")))
    metrics = evaluate_detections(ground_truth, [result([0, 0, 9, 9], 0.9)])
    assert metrics["AP_by_class"] == {"cat (1)": 100, "cat (2)": None, "dog": None}


def test_arguments_are_left_alone_and_nothing_is_printed(capsys):
    ground_truth, results = random_set(3)
    before = copy.deepcopy((ground_truth, results))
    evaluate_detections(ground_truth, results)
    assert (ground_truth, results) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (result([0, 0, 1, 1], 0.5, image=77), "results\\[0\\]: image_id 77"),
        (result([0, 0, 1, 1], 0.5, category=88), "results\\[0\\]: category_id 88"),
        (result([0, 0, float("nan"), 1], 0.5), "must be finite"),
        (result([0, 0, 1, 1], float("inf")), "must be finite"),
    ],
)
def test_unusable_results_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        evaluate_detections(dataset([truth([0, 0, 1, 1])]), [entry])


def corners_to_polygon(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def masked_set(seed):
    """`random_set` in whole pixels, each box with itself as its mask, in each of COCO's forms."""
    ground_truth, results = random_set(seed)
    ground_truth["images"] = [{**image, "height": 300, "width": 310} for image in ground_truth["images"]]
    for number, entry in enumerate(ground_truth["annotations"] + results):
        x, y, width, height = (max(round(value), 0) for value in entry["bbox"])
        entry["bbox"] = [x, y, max(width, 1), max(height, 1)]
        polygons = corners_to_polygon(*entry["bbox"])
        compressed = pycocotools_mask.merge(pycocotools_mask.frPyObjects(polygons, 300, 310))
        mask = np.zeros((300, 310), bool)
        mask[y : y + entry["bbox"][3], x : x + entry["bbox"][2]] = True
        runs = {"size": [300, 310], "counts": run_lengths(mask).tolist()}
        text = {**compressed, "counts": compressed["counts"].decode()}
        entry["segmentation"] = (polygons, compressed, runs, text)[number % 4]
    return ground_truth, results


@pytest.mark.parametrize("seed", range(4))
def test_masks_that_are_boxes_have_the_ap_of_boxes(seed):
    ground_truth, results = masked_set(seed)
    before = copy.deepcopy((ground_truth, results))
    boxes, masks = (evaluate_detections(ground_truth, results, iou_type=kind) for kind in ("bbox", "segm"))
    assert 0 < boxes["AP"] < 100
    assert masks == boxes
    assert (ground_truth, results) == before


def test_masks_are_compared_by_their_pixels():
    # Two triangles of one box share only its diagonal.
    lower, upper = [[0, 0, 0, 40, 40, 40]], [[0, 0, 40, 0, 40, 40]]
    ground_truth = dataset([truth([0, 0, 40, 40], segmentation=lower)])
    ground_truth["images"] = [{"id": 0, "height": 50, "width": 60}]
    for mask, expected in ((lower, 100), (upper, 0)):
        found = [{**result([0, 0, 40, 40], 0.9), "segmentation": mask}]
        assert evaluate_detections(ground_truth, found)["AP"] == 100
        metrics = evaluate_detections(ground_truth, found, iou_type="segm")
        assert metrics["AP"] == expected
        # 800 pixels, though the box has 1600.
        assert (metrics["AP_small"], metrics["AP_medium"]) == (expected, None)
        assert evaluate_detections(ground_truth, found)["AP_small"] is None


def test_a_mask_in_a_crowd_is_not_counted():
    crowd = {"size": [50, 60], "counts": [0, 1500, 1500]}  # the left half
    inside, outside = corners_to_polygon(2, 2, 20, 20), corners_to_polygon(40, 2, 15, 20)
    ground_truth = dataset(
        [truth([0, 0, 30, 50], iscrowd=1, segmentation=crowd), truth([40, 2, 15, 20], segmentation=outside)]
    )
    ground_truth["images"] = [{"id": 0, "height": 50, "width": 60}]
    results = [{**result([2, 2, 20, 20], 0.9), "segmentation": inside}]
    results.append({**result([40, 2, 15, 20], 0.8), "segmentation": outside})
    assert evaluate_detections(ground_truth, results, iou_type="segm")["AP"] == 100


def test_an_empty_mask_is_a_miss():
    ground_truth = dataset([truth([0, 0, 4, 4], segmentation=corners_to_polygon(0, 0, 4, 4))])
    ground_truth["images"] = [{"id": 0, "height": 5, "width": 6}]
    empty = pycocotools_mask.encode(np.zeros((5, 6), np.uint8, order="F"))
    metrics = evaluate_detections(
        ground_truth, [{**result([0, 0, 4, 4], 0.9), "segmentation": empty}], iou_type="segm"
    )
    assert metrics["AP"] == 0


def test_unusable_masks_are_named():
    ground_truth = dataset([truth([0, 0, 4, 4], segmentation=corners_to_polygon(0, 0, 4, 4))])
    ground_truth["images"] = [{"id": 0, "height": 5, "width": 6}]
    with pytest.raises(ValueError, match=r"results\[0\]: invalid 'segmentation': nothing"):
        evaluate_detections(ground_truth, [result([0, 0, 1, 1], 0.5)], iou_type="segm")
    malformed = {**result([0, 0, 1, 1], 0.5), "segmentation": {"size": [5, 6], "counts": "0P"}}
    with pytest.raises(ValueError, match=r"results\[0\]: .* break off inside a number"):
        evaluate_detections(ground_truth, [malformed], iou_type="segm")
    del ground_truth["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match=r"annotations\[0\]: invalid 'segmentation': nothing"):
        evaluate_detections(ground_truth, [], iou_type="segm")
    with pytest.raises(ValueError, match="choose bbox or segm"):
        evaluate_detections(ground_truth, [], iou_type="mask")


def make_detections(*, with_stds):
    boxes = np.array(
        [
            [[1, 2, 11, 32], [0.12345678, 5, 7, 5], [0, 0, 0, 0]],
            [[3, 3, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0]],
            [[9, 9, 8, 8], [0, 0, 0, 0], [0, 0, 0, 0]],
        ],
        np.float32,
    )
    return Detections(
        boxes=boxes,
        scores=np.array([[0.9, 0.3, 0], [0.8, 0, 0], [0.00123456789, 0, 0]], np.float32),
        classes=np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0]]),
        candidate_index=np.zeros((3, 3), np.int32),
        valid=np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], bool),
        box_stds=np.full((3, 3, 4), 1e-5, np.float32) * np.arange(1, 5, dtype=np.float32)
        if with_stds
        else None,
    )


def test_results_entries():
    results = to_coco_results(
        make_detections(with_stds=True), np.array([5, 6, 7]), np.array([True, False, True]), (30, 20)
    )
    stds = [1e-5, 2e-5, 3e-5, 4e-5]
    assert [{**entry, "bbox_std": None} for entry in results] == [
        {"image_id": 5, "category_id": 20, "bbox": [1, 2, 10, 30], "score": 0.9, "bbox_std": None},
        {"image_id": 5, "category_id": 30, "bbox": [0.1235, 5, 6.8765, 0], "score": 0.3, "bbox_std": None},
        # Image 6 fills the batch. A box that is inside out has no size.
        {"image_id": 7, "category_id": 30, "bbox": [9, 9, 0, 0], "score": 0.0012345678, "bbox_std": None},
    ]
    for entry in results:
        np.testing.assert_allclose(entry["bbox_std"], stds, rtol=1e-6)
    assert json.loads(json.dumps(results)) == results


def test_results_with_masks():
    # The first detection's mask fills its box, the one of the third image only its left half.
    masks = np.ones((3, 3, 4, 4), np.float32)
    masks[2, 0, :, 2:] = 0
    detections = make_detections(with_stds=False).replace(masks=masks)
    detections.boxes[2, 0] = [2, 3, 10, 9]
    results = to_coco_results(
        detections,
        np.array([5, 6, 7]),
        np.array([True, False, True]),
        (30, 20),
        image_sizes=np.array([[40, 30], [9, 9], [12, 20]]),
    )
    assert json.loads(json.dumps(results)) == results
    assert [entry["segmentation"]["size"] for entry in results] == [[40, 30], [40, 30], [12, 20]]
    # The boxes [1, 2, 11, 32] (without the outermost pixels of its corners, where the mask fades on both axes)
    # and [2, 3, 6, 9]; the second detection has no height.
    areas = [float(pycocotools_mask.area(entry["segmentation"])) for entry in results]
    assert areas == [pytest.approx(300, abs=12), 0, 24]
    assert pycocotools_mask.toBbox(results[2]["segmentation"]).tolist() == [2, 3, 4, 6]


def test_results_without_stds():
    results = to_coco_results(
        make_detections(with_stds=False), np.array([5, 6, 7]), np.array([False, True, False]), (30, 20)
    )
    assert results == [{"image_id": 6, "category_id": 20, "bbox": [3, 3, 1, 1], "score": 0.8}]
    nothing = to_coco_results(
        make_detections(with_stds=True), np.array([5, 6, 7]), np.zeros(3, bool), (30, 20)
    )
    assert nothing == []


def test_scores_keep_their_order():
    scores = np.float32(0.5) + np.arange(64, dtype=np.float32) * np.finfo(np.float32).eps
    detections = Detections(
        boxes=np.zeros((1, 64, 4), np.float32),
        scores=scores[None],
        classes=np.zeros((1, 64), np.int32),
        candidate_index=np.zeros((1, 64), np.int32),
        valid=np.ones((1, 64), bool),
    )
    entries = to_coco_results(detections, np.array([1]), np.array([True]), (1,))
    np.testing.assert_array_equal(np.array([e["score"] for e in entries], np.float32), scores)
    assert len({entry["score"] for entry in entries}) == 64
