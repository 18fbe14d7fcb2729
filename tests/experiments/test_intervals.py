import json

import numpy as np
import pytest

from experiments import interval_tables, intervals, stored_results
from experiments.interval_picture import draw
from klbox_jax.evaluation.conformal import fit_intervals, split_images
from klbox_jax.evaluation.detected_edges import matched_edges
from klbox_jax.evaluation.edge_calibration import fit_edge_calibration
from klbox_jax.evaluation.results_calibration import CalibrationSettings, check_by_split
from klbox_jax.evaluation.score_calibration_error import evaluate_scores
from klbox_jax.files import write_json
from klbox_jax.train.workdir import Workdir
from tests.evaluation.test_results_calibration import drawn_results
from tests.thin import scenes_config


@pytest.fixture(scope="module")
def found():
    return intervals.compare(*drawn_results(0), num_splits=2)


def test_a_comparison(found):
    json.dumps(found, allow_nan=False)
    assert (found["num_boxes"], found["num_images"], found["num_splits"]) == (180, 60, 2)
    assert found["num_detections"]["0"] == 240 > found["num_detections"]["0.3"]
    rows = {(row["scale"], row["asked"]): row for row in found["intervals"]}
    assert len(rows) == 5 * 4
    assert rows["scaled", 0.9]["interval_score"] < rows["additive", 0.9]["interval_score"]
    assert 0 < found["gain"] < 1
    scores = {(row["method"], row["min_score"]): row for row in found["scores"]}
    assert scores["isotonic", 0.0]["LaECE_0"] < scores["none", 0.0]["LaECE_0"]
    assert [row["group"] for row in found["groups"]] == ["medium", "large", "cat", "dog"]


def test_half_of_the_images_is_fitted_and_the_other_measured():
    """The same numbers as the check of a results file, which is written apart, on the same half."""
    ground_truth, results = drawn_results(0)
    edges = matched_edges(ground_truth, results, iou_threshold=0.5, min_score=0.0)
    is_fitted = split_images(edges.image_ids, 0.5, seed=0)
    found = intervals.measure_intervals(edges, is_fitted)
    wanted = check_by_split(ground_truth, results, CalibrationSettings(scores="none"))["intervals"]
    for kind, by_coverage in wanted.items():
        for coverage, row in by_coverage.items():
            assert {key: found[kind, float(coverage)][key] for key in row} == row
    rest = edges.rows(~is_fitted)
    fitted = fit_intervals(
        edges.errors[is_fitted],
        edges.detected.stds[is_fitted],
        edges.image_ids[is_fitted],
        coverage=0.5,
        level="class",
        classes=edges.detected.classes[is_fitted],
    )
    half = fitted.half_widths(rest.detected.stds, rest.detected.classes)
    inside = found["by class", 0.5]["inside"]
    np.testing.assert_array_equal(inside, (np.abs(rest.errors) <= half).all(axis=1))


def test_groups_are_pooled_over_the_splits():
    ground_truth, results = drawn_results(0)
    found = intervals.compare(ground_truth, results, num_splits=1)
    edges = matched_edges(ground_truth, results, iou_threshold=0.5, min_score=0.0)
    images = np.array([image["id"] for image in ground_truth["images"]])
    is_fitted = np.isin(edges.image_ids, images[split_images(images, 0.5, 0)])
    inside = intervals.measure_intervals(edges, is_fitted)["scaled", 0.9]["inside"]
    cats = edges.detected.classes == 1
    (row,) = (row for row in found["groups"] if row["group"] == "cat")
    assert row["scaled"] == inside[cats[~is_fitted]].mean()
    assert row["num"] == cats.sum()


def test_measures_of_scores_are_those_of_the_package():
    ground_truth, results = drawn_results(0)
    detections = intervals.scored_detections(ground_truth, results)
    is_fitted = np.isin(detections.image_ids, [10 * image for image in range(30)])
    rows = intervals.measure_scores(detections, is_fitted)
    assert set(rows) == {"none", "isotonic", "platt", "linear", "temperature"}
    others = [entry for entry in results if entry["image_id"] >= 300]
    wanted = evaluate_scores(ground_truth, others)
    assert rows["none"] == pytest.approx({name: wanted[name] for name in rows["none"]})


def test_tables(found, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_results, "RESULTS", tmp_path)
    stored_results.read.cache_clear()
    (tmp_path / "intervals_scenes.json").write_text(stored_results.to_text(found))
    tables = {name: table() for name, table in interval_tables.TABLES.items()}
    stored_results.read.cache_clear()
    assert tables["intervals by scale"].count("not run yet") == 2
    rows = {(row["scale"], row["asked"]): row for row in found["intervals"]}
    assert f" {rows['additive', 0.9]['interval_score']:.1f} |" in tables["intervals by scale"]
    assert f" {100 * rows['scaled', 0.8]['coverage']:.1f} ± " in tables["intervals by coverage"]
    assert f" {100 * found['groups'][-1]['by class']:.1f} |" in tables["intervals by group"]
    assert f" {found['scores'][-1]['LaECE_0']:.4f} " in tables["calibrated scores"]


def test_the_evaluation_must_be_of_the_split(tmp_path):
    config = scenes_config("loss=kl", **{"data.root": str(tmp_path / "scenes")})
    workdir = Workdir(tmp_path / "run")
    write_json(workdir.config, config.to_dict())
    with pytest.raises(ValueError, match=r"no evaluation ''.*; run klbox eval \S+ --split=test --name=test"):
        intervals.read_detections(workdir, "test")
    write_json(workdir.eval_dir(3) / "metrics.json", {"data": "scenes/validation"})
    write_json(workdir.eval_dir(3) / "detections.json", [])
    with pytest.raises(ValueError, match="is an evaluation of scenes/validation, not of scenes/test"):
        intervals.read_detections(workdir, "test")
    source, results, metrics = intervals.read_detections(workdir, "validation")
    assert (source.name, results, metrics["data"]) == ("scenes/validation", [], "scenes/validation")

    write_json(workdir.eval_dir(2) / "other" / "metrics.json", {"data": "scenes/test"})
    write_json(workdir.eval_dir(2) / "other" / "detections.json", [{}])
    assert intervals.read_detections(workdir, "test", evaluation="other", step=2)[1] == [{}]
    with pytest.raises(ValueError, match="no evaluation 'other' of this step"):
        intervals.read_detections(workdir, "test", evaluation="other", step=3)

    # A detector that finds every object, for the picture.
    results = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox", "bbox_std")} | {"score": 0.9}
        for entry in source.coco_ground_truth()["annotations"]
    ]
    calibration = fit_edge_calibration(source.coco_ground_truth(), results, data="scenes")
    picture = draw(source, calibration.with_intervals(results), count=2)
    assert picture.dtype == np.uint8
    assert picture.shape[1] > picture.shape[0]
    size = source.settings.image_size
    first = next(i for i, record in enumerate(source.records) if len(record.boxes) in (3, 4))
    enlarged = np.kron(source.load_image(first), np.ones((2, 2, 1))).astype(int)
    drawn = picture[8 : 8 + 2 * size, 8 : 8 + 2 * size].astype(int)
    assert 0.01 < (np.abs(drawn - enlarged) > 80).any(axis=2).mean() < 0.7
