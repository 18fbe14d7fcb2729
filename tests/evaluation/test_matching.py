import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from klbox_jax.evaluation import matching
from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.matching import match_detections, max_f1_score_threshold
from tests.evaluation.test_coco import dataset, random_set, result, truth
from tests.references.uncertainty import best_f1_threshold, corners, partition

NAMES = ("true positive", "duplicate", "localization error", "false positive", "ignored")


def scattered_set(seed):
    """The random set of the AP tests, a third of its detections moved further from their objects."""
    ground_truth, results = random_set(seed, num_images=12)
    rng = np.random.default_rng(seed)
    for entry in results[::3]:
        width, height = entry["bbox"][2:]
        entry["bbox"][0] += float(rng.normal(0, 0.5) * width)
        entry["bbox"][1] += float(rng.normal(0, 0.5) * height)
    return ground_truth, results


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("iou_threshold", "min_score"), [(0.5, 0.0), (0.7, 0.4), (0.3, 0.0)])
def test_agrees_with_plain_loops(seed, iou_threshold, min_score):
    ground_truth, results = scattered_set(seed)
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold, min_score=min_score)
    expected = partition(ground_truth, results, iou_threshold=iou_threshold, min_score=min_score)
    assert sorted(matches.result_index) == sorted(expected)
    seen = set()
    for d, position in enumerate(matches.result_index):
        name, annotation = expected[position]
        assert NAMES[matches.kind[d]] == name
        seen.add(name)
        np.testing.assert_allclose(matches.boxes[d], corners(results[position]["bbox"]))
        assert matches.scores[d] == results[position]["score"]
        assert matches.category_ids[d] == results[position]["category_id"]
        if annotation is None:
            assert matches.object_index[d] == -1
            assert matches.iou[d] == 0
        else:
            row = matches.object_index[d]
            np.testing.assert_allclose(matches.objects.boxes[row], corners(annotation["bbox"]))
            assert matches.objects.category_ids[row] == annotation["category_id"]
    assert seen == set(NAMES)
    assert (np.diff(matches.scores) <= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_true_positives_are_those_of_average_precision(seed):
    # The recall that COCO reports is the share of objects with a true positive, class by class.
    ground_truth, results = scattered_set(seed)
    matches = match_detections(ground_truth, results)
    hits = matches.category_ids[matches.kind == matching.TRUE_POSITIVE]
    recalls = [
        (hits == category).sum() / (matches.objects.category_ids == category).sum() for category in (3, 7, 9)
    ]
    evaluations = []
    accumulate = COCOeval.accumulate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(COCOeval, "accumulate", lambda self: (evaluations.append(self), accumulate(self)))
        evaluate_detections(ground_truth, results)
    np.testing.assert_allclose(evaluations[0].eval["recall"][0, :3, 0, -1], recalls, atol=1e-12)


def test_the_partition_by_hand():
    # Side 10. Shifted by d pixels, the IoU is (10 - d) / (10 + d): .82, .67 of the first object; .43; .09.
    ground_truth = dataset([truth([0, 0, 10, 10]), truth([100, 0, 10, 10])], classes=((1, "cat"), (2, "dog")))
    results = [
        result([2, 0, 10, 10], 0.5),  # 8 / 12
        result([1, 0, 10, 10], 0.9),  # 9 / 11
        result([4, 0, 10, 10], 0.8),  # 6 / 14
        result([8.35, 0, 10, 10], 0.7),  # 1.65 / 18.35
        result([0, 0, 10, 10], 0.6, category=2),  # no object of its class
    ]
    matches = match_detections(ground_truth, results)
    assert matches.result_index.tolist() == [1, 2, 3, 4, 0]
    assert matches.kind.tolist() == [
        matching.TRUE_POSITIVE,
        matching.LOCALIZATION_ERROR,
        matching.FALSE_POSITIVE,
        matching.FALSE_POSITIVE,
        matching.DUPLICATE,
    ]
    assert matches.object_index.tolist() == [0, 0, -1, -1, 0]
    np.testing.assert_allclose(matches.iou, [9 / 11, 6 / 14, 0, 0, 8 / 12])


def test_the_second_best_object_is_taken_if_the_best_is_gone():
    # Both overlap the first object more: IoU 1 and 9.1 / 10.9, against 8 / 12 and 8.9 / 11.1.
    ground_truth = dataset([truth([0, 0, 10, 10]), truth([2, 0, 10, 10])])
    results = [result([0, 0, 10, 10], 0.9), result([0.9, 0, 10, 10], 0.8)]
    matches = match_detections(ground_truth, results)
    assert matches.kind.tolist() == [matching.TRUE_POSITIVE] * 2
    assert matches.object_index.tolist() == [0, 1]


def test_an_iou_at_the_threshold_counts():
    ground_truth = dataset([truth([0, 0, 10, 10])])
    half = match_detections(ground_truth, [result([0, 0, 10, 5], 0.9)])
    tenth = match_detections(ground_truth, [result([0, 0, 10, 1], 0.9)])
    assert half.kind.tolist() == [matching.TRUE_POSITIVE]
    assert tenth.kind.tolist() == [matching.FALSE_POSITIVE]


def test_labels_are_the_noisy_boxes_where_there_are_some():
    annotations = [
        truth([0, 0, 10, 10], bbox_noisy=[1, 2, 10, 20], bbox_std=[0.5, 1, 2, 3]),
        truth([50, 0, 10, 10]),
    ]
    objects = match_detections(dataset(annotations), []).objects
    np.testing.assert_array_equal(objects.boxes, [[0, 0, 10, 10], [50, 0, 60, 10]])
    np.testing.assert_array_equal(objects.labels, [[1, 2, 11, 22], [50, 0, 60, 10]])
    np.testing.assert_array_equal(objects.label_stds, [[0.5, 1, 2, 3], [np.nan] * 4])


def test_nothing_to_match():
    ground_truth, results = random_set(0)
    none = match_detections(ground_truth, [])
    assert none.boxes.shape == (0, 4)
    assert none.stds is None
    assert len(none.objects.boxes) > 0
    empty = match_detections({**ground_truth, "annotations": []}, results)
    assert (empty.kind == matching.FALSE_POSITIVE).all()
    assert empty.objects.boxes.shape == (0, 4)


@pytest.mark.parametrize("seed", range(4))
def test_threshold_of_the_best_f1(seed):
    ground_truth, results = random_set(seed)
    assert max_f1_score_threshold(ground_truth, results) == best_f1_threshold(
        ground_truth, results, iou_threshold=0.5
    )


def test_threshold_of_the_best_f1_by_hand():
    # Two objects. From .9 on F1 is 2/3; from .8 on 2/4, a tie of a miss and a hit: 2 * 2 / 5 = .8; from .1: .67.
    ground_truth = dataset([truth([0, 0, 10, 10]), truth([50, 0, 10, 10])])
    results = [
        result([0, 0, 10, 10], 0.9),
        result([200, 0, 10, 10], 0.8),
        result([50, 0, 10, 10], 0.8),
        result([300, 0, 10, 10], 0.1),
    ]
    assert max_f1_score_threshold(ground_truth, results) == 0.8
    assert max_f1_score_threshold(ground_truth, []) is None
    assert max_f1_score_threshold(dataset([]), results) is None


def test_ids_may_be_texts():
    ground_truth = {
        "images": [{"id": "a"}, {"id": "b"}],
        "categories": [{"id": "cat", "name": "cat"}, {"id": "dog", "name": "dog"}],
        "annotations": [truth([0, 0, 10, 10], image="a", category="cat")],
    }
    results = [
        result([0, 0, 10, 10], 0.9, image="b", category="cat"),
        result([0, 0, 10, 10], 0.8, image="a", category="dog"),
        result([0, 0, 10, 10], 0.7, image="a", category="cat"),
    ]
    matches = match_detections(ground_truth, results)
    assert matches.kind.tolist() == [matching.FALSE_POSITIVE, matching.FALSE_POSITIVE, matching.TRUE_POSITIVE]
    assert matches.category_ids.tolist() == ["cat", "dog", "cat"]
    assert matches.objects.category_ids.tolist() == ["cat"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, "results\\[1\\]: image_id 5 is not"),
        ({"category_id": 5}, "results\\[1\\]: category_id 5 is not"),
        ({"bbox": [0, 0, 1]}, "results\\[1\\]: bbox must be four finite numbers"),
        ({"bbox": None}, "results\\[1\\]: bbox must be four finite numbers"),
        ({"score": float("nan")}, "results\\[1\\]: score must be a finite number"),
        ({"score": None}, "results\\[1\\]: score must be a finite number"),
        ({"bbox_std": [1, 1, 1, float("inf")]}, "results\\[1\\]: bbox_std must be four finite"),
        ({"bbox_std": [1, 1, 1, -1]}, "results\\[1\\]: bbox_std .* negative"),
    ],
)
def test_unusable_results_are_named(change, message):
    good = {**result([0, 0, 1, 1], 0.5), "bbox_std": [1, 1, 1, 1]}
    with pytest.raises(ValueError, match=message):
        match_detections(dataset([]), [good, {**good, **change}])


def test_stds_of_some_results_only_are_refused():
    without = result([0, 0, 1, 1], 0.5)
    with_stds = {**without, "bbox_std": [1, 1, 1, 1]}
    with pytest.raises(ValueError, match="results\\[1\\] lacks bbox_std"):
        match_detections(dataset([]), [with_stds, without])
    with pytest.raises(ValueError, match="results\\[1\\] has bbox_std"):
        match_detections(dataset([]), [without, with_stds])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox_noisy": [0, 0, 1]}, "annotations\\[1\\]: bbox_noisy must be four"),
        ({"bbox_std": [1, 1, 1, -2]}, "annotations\\[1\\]: bbox_std .* negative"),
        ({"category_id": 9}, "annotations\\[1\\]: category_id 9"),
    ],
)
def test_unusable_annotations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        match_detections(dataset([truth([0, 0, 1, 1]), {**truth([0, 0, 1, 1]), **change}]), [])


def test_thresholds_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="background_iou < iou_threshold"):
        match_detections(dataset([]), [], iou_threshold=0.1)
    with pytest.raises(ValueError, match="background_iou < iou_threshold"):
        match_detections(dataset([]), [], iou_threshold=1.5)
