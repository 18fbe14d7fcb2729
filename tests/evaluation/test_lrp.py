import json

import numpy as np
import pytest

from klbox_jax.evaluation.lrp import evaluate_lrp
from tests.evaluation.test_coco import dataset, random_set, result, truth
from tests.evaluation.test_matching import scattered_set
from tests.references.lrp import lrp, optimal_lrp

PARTS = ("oLRP", "oLRP_localization", "oLRP_false_positive", "oLRP_false_negative")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("iou_threshold", [0.5, 0.8])
def test_agrees_with_plain_loops(seed, iou_threshold):
    ground_truth, results = scattered_set(seed)
    found = evaluate_lrp(ground_truth, results, iou_threshold=iou_threshold, min_score=0.35)
    assert list(found["by_class"]) == ["cat", "dog", "emu", "fox"]
    for name, category in (("cat", 3), ("dog", 7), ("emu", 9)):
        entry = found["by_class"][name]
        expected, threshold = optimal_lrp(ground_truth, results, category, iou_threshold=iou_threshold)
        for name, part in zip(PARTS, expected, strict=True):
            assert entry[name] == (None if part is None else pytest.approx(100 * part))
        assert entry["score_threshold"] == (None if threshold == float("inf") else threshold)
        fixed, *_ = lrp(ground_truth, results, category, iou_threshold=iou_threshold, min_score=0.35)
        assert entry["LRP"] == pytest.approx(100 * fixed)
        assert entry["LRP"] >= entry["oLRP"]
    assert set(found["by_class"]["fox"].values()) == {None}
    for name in ("LRP", "oLRP", "oLRP_false_negative"):
        assert found[name] == pytest.approx(
            np.mean([found["by_class"][c][name] for c in ("cat", "dog", "emu")])
        )


def test_by_hand():
    # Two objects; best first: a hit of IoU .8, a miss, a hit of IoU .9. With 0, 1, 2, 3 detections, tau .5:
    # 2/2 = 1; (.4 + 1) / 2 = .7; (.4 + 1 + 1) / 3 = .8; (.4 + .2 + 1) / 3 = .533.
    ground_truth = dataset([truth([0, 0, 10, 10]), truth([50, 0, 10, 10])])
    results = [
        result([0, 0, 10, 8], 0.9),
        result([200, 0, 10, 10], 0.8),
        result([50, 0, 10, 9], 0.7),
    ]
    found = evaluate_lrp(ground_truth, results, min_score=0.8)
    assert found["oLRP"] == pytest.approx(160 / 3)
    assert found["oLRP_localization"] == pytest.approx(15)
    assert found["oLRP_false_positive"] == pytest.approx(100 / 3)
    assert found["oLRP_false_negative"] == 0
    assert found["LRP"] == pytest.approx(80)
    assert found["by_class"]["cat"]["score_threshold"] == 0.7
    # Without the last hit, the first alone is best.
    assert evaluate_lrp(ground_truth, results[:2])["by_class"]["cat"]["score_threshold"] == 0.9


def test_a_tie_is_taken_whole():
    # The hit alone would have an error of 0; the miss has the same score: 1 / 2.
    ground_truth = dataset([truth([0, 0, 10, 10])])
    results = [result([0, 0, 10, 10], 0.5), result([50, 0, 10, 10], 0.5)]
    assert evaluate_lrp(ground_truth, results)["oLRP"] == 50


def test_perfect_and_useless_detections():
    ground_truth, _ = random_set(2)
    perfect = [
        result(a["bbox"], 0.5, image=a["image_id"], category=a["category_id"])
        for a in ground_truth["annotations"]
        if not a["iscrowd"]
    ]
    found = evaluate_lrp(ground_truth, perfect)
    assert [found[name] for name in ("LRP", *PARTS)] == pytest.approx([0] * 5)
    useless = evaluate_lrp(dataset([truth([0, 0, 9, 9])]), [result([50, 50, 9, 9], 0.9)])
    assert (useless["LRP"], useless["oLRP"]) == (100, 100)
    assert useless["by_class"]["cat"]["score_threshold"] is None
    assert useless["oLRP_localization"] is None


def test_nothing():
    empty = evaluate_lrp(dataset([truth([0, 0, 9, 9])]), [])
    assert (empty["LRP"], empty["oLRP"], empty["oLRP_false_negative"]) == (100, 100, 100)
    none = evaluate_lrp(dataset([]), [result([0, 0, 1, 1], 0.5)])
    assert none["oLRP"] is None
    assert json.loads(json.dumps(none)) == none


def test_unusable_arguments_are_refused():
    with pytest.raises(ValueError, match="below 1"):
        evaluate_lrp(dataset([]), [], iou_threshold=1.0)
    with pytest.raises(ValueError, match="results\\[0\\]: image_id 7"):
        evaluate_lrp(dataset([]), [result([0, 0, 1, 1], 0.5, image=7)])
