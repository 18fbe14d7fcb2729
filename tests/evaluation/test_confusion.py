import numpy as np
import pytest

from klbox_jax.evaluation.confusion import confusion_matrix
from tests.evaluation.test_coco import dataset, random_set, result, truth

CLASSES = ((3, "cat"), (7, "dog"))
BOX = [0, 0, 50, 50]


def test_pairs_of_classes_by_hand():
    objects = [truth(BOX, image=10 * i, category=3) for i in range(3)] + [truth(BOX, image=30, category=7)]
    objects.append(truth([200, 0, 90, 90], image=30, category=3, iscrowd=1))
    results = [
        result(BOX, 0.9, image=0, category=3),  # right
        result(BOX, 0.8, image=0, category=3),  # a duplicate: background
        result(BOX, 0.9, image=10, category=7),  # cat taken for a dog
        result([500, 0, 9, 9], 0.6, image=20, category=7),  # background; the cat is missed
        result(BOX, 0.4, image=20, category=3),  # below the least score
        result(BOX, 0.5, image=30, category=7),  # right, at the least score
        result([210, 10, 50, 50], 0.9, image=30, category=3),  # in a crowd of its class
        result([210, 10, 50, 50], 0.9, image=30, category=7),  # in a crowd of another class: background
    ]
    counts = confusion_matrix(dataset(objects, num_images=4, classes=CLASSES), results)
    np.testing.assert_array_equal(counts, [[1, 1, 1], [0, 1, 0], [1, 2, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_objects_and_detections_are_counted_once(seed):
    ground_truth, results = random_set(seed)
    for entry in ground_truth["annotations"]:
        entry["iscrowd"] = 0
    counts = confusion_matrix(ground_truth, results, min_score=0.35)
    ids = (3, 7, 9, 12)
    objects = [sum(a["category_id"] == i for a in ground_truth["annotations"]) for i in ids]
    found = [sum(r["category_id"] == i and r["score"] >= 0.35 for r in results) for i in ids]
    np.testing.assert_array_equal(counts[:-1].sum(axis=1), objects)
    np.testing.assert_array_equal(counts[:, :-1].sum(axis=0), found)
    assert counts[-1, -1] == 0


def test_nothing_to_confuse():
    np.testing.assert_array_equal(confusion_matrix(dataset([]), []), [[0, 0], [0, 0]])
