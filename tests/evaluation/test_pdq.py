import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from klbox_jax.data.masks import run_lengths
from klbox_jax.evaluation.pdq import detected_pixels, evaluate_pdq, spatial_qualities
from tests.evaluation.test_coco import dataset, result, truth
from tests.references.pdq import pdq, probability

CLASSES = ((1, "cat"), (2, "dog"), (3, "emu"))


def sized(annotations, *, height=24, width=30, num_images=1, classes=CLASSES):
    ground_truth = dataset(annotations, num_images=num_images, classes=classes)
    ground_truth["images"] = [{**i, "height": height, "width": width} for i in ground_truth["images"]]
    return ground_truth


def detection(box, score, stds=(1e-3,) * 4, **more):
    return {**result(box, score, **more), "bbox_std": [float(s) for s in stds]}


def random_images(seed, num_images=3):
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(num_images):
        for _ in range(rng.integers(0, 4)):
            box = np.concatenate([rng.uniform(0, 14, 2), rng.uniform(4, 10, 2)])
            category = int(rng.integers(1, 4))
            crowd = int(rng.random() < 0.25)
            annotations.append(truth(box.tolist(), image=10 * image, category=category, iscrowd=crowd))
            for _ in range(rng.integers(0, 3)):
                near = (box + rng.normal(0, 0.7, 4)).tolist()
                stds = rng.uniform(0.2, 3, 4)
                category = category if rng.random() < 0.8 else int(rng.integers(1, 4))
                results.append(
                    detection(near, float(rng.random()), stds, image=10 * image, category=category)
                )
    results.append(detection([1, 1, 4, 3], 0.5))
    return sized(annotations, num_images=num_images), results


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_plain_loops(seed):
    ground_truth, results = random_images(seed)
    expected, hits, false_positives, missed = pdq(ground_truth, results)
    found = evaluate_pdq(ground_truth, results)
    assert found["PDQ"] == pytest.approx(100 * expected, abs=1e-3)
    counts = (found["true_positives"], found["false_positives"], found["false_negatives"])
    assert counts == (hits, false_positives, missed)


def test_probabilities_agree_with_plain_loops():
    for box, stds in (
        ([5.3, 4.2, 9.9, 11.4], [0.5, 3, 1, 0.1]),
        ([0, 0, 30, 24], [2, 2, 2, 2]),
        ([-3, 5, 8, 6], [4, 1, 2, 5]),
    ):
        entry = detection(box, 0.5, stds)
        expected = [[probability(entry, r, c, 24, 30) for c in range(30)] for r in range(24)]
        corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]], float)
        window, inside = detected_pixels(corners, np.array(stds, float), height=24, width=30)
        found = np.zeros((24, 30))
        found[window] = inside
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_uncertain_edge_by_hand():
    # x1 is 10 with a std of 2, the rest is certain. The object has columns 10 to 19: column i is detected with
    # Phi((i + 1 - 10) / 2). Columns 5 to 9 are background, with 1 - Phi((i + 1 - 10) / 2); from column 4 on the
    # chance is Phi(-2.5) = .006, of column 3 Phi(-3) = .0013, too faint.
    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    ground_truth = sized([truth([10, 5, 10, 4])])
    found = detection([10, 5, 10, 4], 0.81, [2, 0, 0, 0])
    foreground = sum(math.log(phi((i + 1 - 10) / 2)) for i in range(10, 20)) / 10
    background = sum(math.log(1 - phi((i + 1 - 10) / 2)) for i in range(4, 10)) / 10
    scores = evaluate_pdq(ground_truth, [found])
    assert scores["foreground_quality"] == pytest.approx(100 * math.exp(foreground), rel=1e-4)
    assert scores["background_quality"] == pytest.approx(100 * math.exp(background), rel=1e-4)
    assert scores["spatial_quality"] == pytest.approx(100 * math.exp(foreground + background), rel=1e-4)
    assert scores["label_quality"] == pytest.approx(81)
    assert scores["PDQ"] == pytest.approx(90 * math.exp((foreground + background) / 2), rel=1e-4)


@pytest.mark.parametrize(
    "box", [[3, 4, 10, 8], [0, 0, 30, 24], [3.25, 4.5, 9.5, 7.1], [0.1 + 0.2, 7, 5.7, 9]]
)
@pytest.mark.parametrize("with_stds", [True, False])
def test_a_perfect_detection_has_full_quality(box, with_stds):
    found = result(box, 1.0) | ({"bbox_std": [0, 0, 0, 0]} if with_stds else {})
    scores = evaluate_pdq(sized([truth(box)]), [found])
    assert scores["PDQ"] == pytest.approx(100, abs=1e-6)
    assert (scores["true_positives"], scores["false_positives"], scores["false_negatives"]) == (1, 0, 0)


def test_false_positives_and_missed_objects_lower_pdq():
    objects = [truth([1, 1, 10, 10]), truth([15, 1, 10, 10])]
    found = [detection([1, 1, 10, 10], 1.0, [0] * 4), detection([15, 12, 10, 10], 1.0, [0] * 4)]
    # One perfect pair; one missed, one too much.
    scores = evaluate_pdq(sized(objects), found)
    assert scores["PDQ"] == pytest.approx(100 / 3)
    assert scores["spatial_quality"] == pytest.approx(100)
    assert evaluate_pdq(sized(objects), found[:1])["PDQ"] == pytest.approx(50)
    low = [found[0], {**found[1], "score": 0.2}]
    assert evaluate_pdq(sized(objects), low, min_score=0.3)["false_positives"] == 0


def test_the_assignment_is_the_best_of_all_and_not_greedy():
    # The first detection fits both objects; greedily it would take the first, which only the second can find.
    objects = [truth([5, 5, 10, 10]), truth([6, 5, 10, 10])]
    wide = detection([5.5, 5, 10, 10], 0.9, [0.6, 0.05, 0.6, 0.05])
    sharp = detection([5, 5, 10, 10], 0.7, [0.05] * 4)
    scores = evaluate_pdq(sized(objects), [wide, sharp])
    assert scores["true_positives"] == 2
    assert scores["PDQ"] == pytest.approx(100 * pdq(sized(objects), [wide, sharp])[0], abs=1e-3)


def test_another_class_shares_what_the_score_leaves():
    # Three classes: .4 of probability over two others.
    scores = evaluate_pdq(sized([truth([3, 3, 9, 9], category=2)]), [detection([3, 3, 9, 9], 0.6)])
    assert scores["label_quality"] == pytest.approx(20)
    alone = sized([truth([3, 3, 9, 9])], classes=((1, "cat"),))
    assert evaluate_pdq(alone, [detection([3, 3, 9, 9], 0.6)])["label_quality"] == pytest.approx(60)


@pytest.mark.parametrize("form", ["polygon", "counts", "compressed"])
def test_masks_are_the_foreground(form):
    # The lower left half of a square, as stairs: 1, 2, ..., 8 pixels wide. What is in the box but not in the
    # mask counts nowhere.
    mask = np.zeros((24, 30), np.uint8)
    for step in range(8):
        mask[6 + step, 4 : 5 + step] = 1
    lengths = run_lengths(mask.astype(bool)).tolist()
    stairs = [4, 14, *(c for s in range(8) for c in (4 + s, 6 + s, 5 + s, 6 + s)), 12, 14]
    segmentation = {
        "polygon": [stairs],
        "counts": {"counts": lengths, "size": [24, 30]},
        "compressed": coco_mask.encode(np.asfortranarray(mask)),
    }[form]
    ground_truth = sized([truth([4, 6, 8, 8], segmentation=segmentation)])
    results = [detection([4.5, 5.5, 8, 8], 0.7, [1, 0.5, 1, 0.5])]
    expected, *_ = pdq(ground_truth, results, masks={1: mask.tolist()})
    assert evaluate_pdq(ground_truth, results)["PDQ"] == pytest.approx(100 * expected, abs=1e-3)
    whole = evaluate_pdq(sized([truth([4, 6, 8, 8])]), results)["PDQ"]
    assert whole != pytest.approx(100 * expected, rel=0.01)


def test_a_malformed_mask_is_named():
    ground_truth = sized([truth([4, 6, 8, 8], segmentation=[[1, 2, 3]], id=5)])
    with pytest.raises(ValueError, match="annotation 5: invalid 'segmentation': a polygon"):
        evaluate_pdq(ground_truth, [])


def test_detections_in_a_crowd_are_not_counted():
    crowd = truth([0, 0, 20, 20], iscrowd=1)
    found = [detection([2, 2, 5, 5], 0.9), detection([2, 2, 5, 5], 0.9, category=2)]
    scores = evaluate_pdq(sized([crowd]), found)
    assert (scores["true_positives"], scores["false_positives"], scores["false_negatives"]) == (0, 1, 0)
    assert scores["PDQ"] == 0


def test_objects_without_a_pixel_have_no_quality():
    qualities = spatial_qualities(
        [truth([40, 5, 5, 5])],
        [detection([40, 5, 5, 5], 0.9), detection([1, 1, 5, 5], 0.9)],
        height=24,
        width=30,
    )
    for quality in qualities:
        np.testing.assert_array_equal(quality, [[0, 0]])


def test_nothing():
    nothing = evaluate_pdq(sized([]), [])
    assert set(nothing.values()) == {None, 0}
    assert evaluate_pdq(sized([truth([1, 1, 5, 5])]), [])["PDQ"] == 0
    only = evaluate_pdq(sized([]), [detection([1, 1, 5, 5], 0.9)])
    assert (only["PDQ"], only["false_positives"], only["spatial_quality"]) == (0, 1, None)
    assert json.loads(json.dumps(only)) == only


def test_unusable_input_is_refused():
    ground_truth = dataset([truth([0, 0, 5, 5])])
    with pytest.raises(ValueError, match="images\\[0\\]: height and width"):
        evaluate_pdq(ground_truth, [])
    with pytest.raises(ValueError, match=r"results\[0\]: score 1\.5 is not a probability"):
        evaluate_pdq(sized([]), [detection([1, 1, 5, 5], 1.5)])
    with pytest.raises(ValueError, match="results\\[0\\]: category_id 9"):
        evaluate_pdq(sized([]), [detection([1, 1, 5, 5], 0.5, category=9)])
