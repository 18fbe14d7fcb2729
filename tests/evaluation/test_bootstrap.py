import copy

import numpy as np
import pytest

from klbox_jax.evaluation.bootstrap import average_precision_by_iou, match_classes, resample_counts
from klbox_jax.evaluation.coco import evaluate_detections


def random_set(seed, num_images=12):
    rng = np.random.default_rng(seed)
    images = [{"id": 10 + i, "width": 100, "height": 100} for i in range(num_images)]
    categories = [{"id": 1, "name": "a"}, {"id": 5, "name": "b"}, {"id": 7, "name": "never shown"}]
    annotations, results = [], []
    for image in images:
        first_result = len(results)
        for _ in range(rng.integers(0, 5)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(10, 40, 2)]
            category = int(rng.choice([1, 5]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": (np.array(box) + rng.normal(0, 3, 4)).tolist(),
                        # Equal in different images, never in one.
                        "score": (len(results) - first_result) / 20,
                    }
                )
    return {"images": images, "categories": categories, "annotations": annotations}, results


def repeat_images(truth, results, counts):
    """Returns the data set with counts[i] copies of image i, each with ids of its own."""
    out = {"images": [], "categories": truth["categories"], "annotations": []}
    found = []
    for image, count in zip(truth["images"], counts, strict=True):
        for _ in range(count):
            new_id = len(out["images"]) + 1
            out["images"].append({**image, "id": new_id})
            for source, target in ((truth["annotations"], out["annotations"]), (results, found)):
                for entry in source:
                    if entry["image_id"] == image["id"]:
                        target.append({**copy.deepcopy(entry), "image_id": new_id, "id": len(target) + 1})
    return out, found


@pytest.mark.parametrize("seed", range(5))
def test_counts_of_one_give_cocos_own_numbers(seed):
    truth, results = random_set(seed)
    ours = average_precision_by_iou(match_classes(truth, results), np.ones(12, int))
    np.testing.assert_allclose(ours, evaluate_detections(truth, results)["AP_by_iou"], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_counts_equal_a_data_set_of_repeated_images(seed):
    truth, results = random_set(seed)
    counts = resample_counts(num_images=12, num_resamples=1, seed=seed)[0]
    ours = average_precision_by_iou(match_classes(truth, results), counts)
    repeated = evaluate_detections(*repeat_images(truth, results, counts))
    np.testing.assert_allclose(ours, repeated["AP_by_iou"], atol=1e-9)


def test_by_hand():
    # Two images with an object each. The object of the first is found exactly, that of the second is not, and
    # a wrong box there has the higher score.
    box = [10.0, 10.0, 20.0, 20.0]
    truth = {
        "images": [{"id": 1, "width": 90, "height": 90}, {"id": 2, "width": 90, "height": 90}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": box},
            {"id": 2, "image_id": 2, "category_id": 1, "bbox": box},
        ],
    }
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5},
        {"image_id": 2, "category_id": 1, "bbox": [60.0, 60.0, 20.0, 20.0], "score": 0.9},
    ]
    classes = match_classes(truth, results)
    # Each once: precision 1/2 up to recall 1/2, which is 51 of the 101 levels.
    np.testing.assert_allclose(average_precision_by_iou(classes, np.array([1, 1])), 100 * 51 / 101 / 2)
    # The first alone, twice: all found.
    np.testing.assert_allclose(average_precision_by_iou(classes, np.array([2, 0])), 100.0)
    # Three of the first and one of the second: precision 3/4 up to recall 3/4, 76 levels.
    np.testing.assert_allclose(average_precision_by_iou(classes, np.array([3, 1])), 100 * 76 / 101 * 0.75)
    assert average_precision_by_iou(classes, np.array([0, 0])) is None


def test_no_detections_at_all():
    truth, _ = random_set(0)
    np.testing.assert_array_equal(average_precision_by_iou(match_classes(truth, []), np.ones(12, int)), 0.0)


def test_a_resample_has_as_many_images_as_the_set():
    counts = resample_counts(num_images=40, num_resamples=30, seed=3)
    assert counts.shape == (30, 40)
    assert (counts.sum(axis=1) == 40).all()
    # Each image is drawn once on average, and left out with probability (1 - 1/40)^40 = 0.363.
    assert 0.3 < (counts == 0).mean() < 0.43
