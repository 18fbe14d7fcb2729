import json

import numpy as np
import pytest
from scipy import stats

from experiments import seeds
from klbox_jax.evaluation.bootstrap import match_classes
from klbox_jax.evaluation.coco import evaluate_detections

CURVE = [70.0, 65.0, 60.0, 55.0, 50.0, 45.0, 35.0, 25.0, 10.0, 2.0]


def row(name, seed, gain=0.0):
    curve = [value + gain for value in CURVE]
    numbers = dict(zip(seeds.METRICS, seeds.metrics_of_curve(np.array(curve)), strict=True))
    labels = {"name": name, "loss": "kl", "suppression": "hard", "voting": "none"}
    return labels | numbers | {"AP_by_iou": curve, "seed": seed, "seconds": 10.0}


def test_metrics_of_a_curve():
    # The mean of the ten, then IoU 0.5, 0.6, 0.7, 0.75, 0.8 and 0.9.
    np.testing.assert_allclose(
        seeds.metrics_of_curve(np.array(CURVE)), [41.7, 70.0, 60.0, 50.0, 45.0, 35.0, 10.0]
    )


def test_rows_are_averaged_over_seeds():
    (mean,) = seeds.mean_rows([[row("a", 0)], [row("a", 1, gain=2.0)]])
    assert mean["AP50"] == 71.0
    assert mean["std"]["AP50"] == pytest.approx(np.sqrt(2.0))
    assert mean["AP_by_iou"][0] == 71.0
    assert mean["seeds"] == [0, 1]
    (alone,) = seeds.mean_rows([[row("a", 0)]])
    assert alone["std"]["AP"] is None


def found_set(rng, noise):
    """Ten images with three objects each, found with an error of `noise` pixels."""
    truth = {
        "images": [{"id": i, "width": 200, "height": 200} for i in range(10)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [],
    }
    results = []
    for image in truth["images"]:
        for _ in range(3):
            box = np.array([*rng.uniform(0, 100, 2), *rng.uniform(20, 80, 2)])
            entry = {"image_id": image["id"], "category_id": 1}
            truth["annotations"].append({**entry, "id": len(results) + 1, "bbox": box.tolist()})
            results.append(
                {**entry, "bbox": (box + noise * rng.normal(size=4)).tolist(), "score": rng.random()}
            )
    return truth, results


def test_differences_pair_rows_of_one_seed_and_draw_the_same_images():
    rows_by_seed, matched = [], {}
    for seed in range(3):
        truth, good = found_set(np.random.default_rng(seed), noise=1.0)
        _, bad = found_set(np.random.default_rng(seed), noise=4.0)
        rows = []
        for name, results in (("good", good), ("bad", bad)):
            metrics = evaluate_detections(truth, results)
            rows.append(row(name, seed) | {key: metrics[key] for key in (*seeds.METRICS, "AP_by_iou")})
            matched[seed, name] = match_classes(truth, results)
        rows_by_seed.append(rows)
    resampled = seeds.resampled_metrics(matched)
    found = {one.metric: one for one in seeds.paired_differences(rows_by_seed, resampled, [("good", "bad")])}
    for metric, one in found.items():
        gains = [rows[0][metric] - rows[1][metric] for rows in rows_by_seed]
        np.testing.assert_allclose(one.by_seed, gains)
        assert one.mean == pytest.approx(np.mean(gains))
        half = stats.sem(gains) * stats.t.ppf(0.975, 2)
        np.testing.assert_allclose(one.seeds, [np.mean(gains) - half, np.mean(gains) + half])
        assert one.images[0] <= one.images[1]
    assert found["AP"].images[0] > 0
    # A row less itself is nothing, on whatever images.
    (same, *_) = seeds.paired_differences(rows_by_seed, resampled, [("good", "good")])
    assert same.by_seed == (0.0, 0.0, 0.0)
    assert same.images == (0.0, 0.0)
    assert json.loads(json.dumps([one.to_dict() for one in found.values()]))


def test_the_table_says_what_is_above_zero():
    means = seeds.mean_rows([[row("a", s), row("b", s, gain=1.0 + s)] for s in range(2)])
    sure = seeds.Difference("b", "a", "AP", (1.0, 1.1, 1.2), (0.5, 1.5))
    unsure = seeds.Difference("b", "a", "AP90", (1.0, -1.0, 3.0), (0.5, 1.5))
    text = seeds.markdown(seeds.Comparison(means, [sure, unsure]), meta={"data": "x"})
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("| b - a")}
    assert lines["AP"].rstrip(" |").endswith("yes")
    assert lines["AP90"].rstrip(" |").endswith("no")
    assert "| 43.2 ± 0.7 |" in text  # b: 42.7 and 43.7
