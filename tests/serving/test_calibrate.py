import numpy as np
import pytest

from klbox_jax.data.plan import EvalPlan
from klbox_jax.errors import WorkdirError
from klbox_jax.evaluation.edge_calibration_scores import evaluate_edge_calibration
from klbox_jax.evaluation.temperature import scale_stds
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.files import read_json, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.serving import calibrate as module
from klbox_jax.serving.calibrate import calibrate, fit_temperatures
from klbox_jax.train.calibration_file import load_temperature
from klbox_jax.train.edge_calibration_file import edge_calibration_file, load_edge_calibration
from klbox_jax.train.job import Job
from klbox_jax.train.run_evaluation import Evaluation
from klbox_jax.train.workdir import Workdir
from tests.thin import scenes_config

NAMED = {"plain": {"voting": "none"}, "full": {"suppression": "soft_gaussian"}}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return {"data.root": str(tmp_path_factory.mktemp("scenes"))}


@pytest.fixture
def make_job(scenes, tmp_path, monkeypatch):
    """Makes a job whose detector finds every object, with stds half as large as its errors are."""
    asked = []

    def detections(self, params, source, plan, *, step):
        assert isinstance(plan, EvalPlan)
        asked.append(source.name)
        rng = np.random.default_rng(len(source.name))
        found = []
        for entry in source.coco_ground_truth()["annotations"]:
            x, y, width, height = entry["bbox_noisy"]
            stds = rng.uniform(0.2, 0.6, 4)
            x1, y1, x2, y2 = rng.normal([x, y, x + width, y + height], 2 * stds)
            box = [max(x1, 0.0), max(y1, 0.0), x2 - max(x1, 0.0), y2 - max(y1, 0.0)]
            found.append(
                {key: entry[key] for key in ("image_id", "category_id")}
                | {"bbox": box, "score": float(rng.uniform(0.2, 1)), "bbox_std": stds.tolist()}
            )
        return {name: list(found) for name in self._settings}

    monkeypatch.setattr(Evaluation, "detections", detections)
    monkeypatch.setattr(module, "restore_params", lambda folder, step: (6 if step is None else step, {}))

    def make(arg="loss=kl", **fields):
        return Job(config=scenes_config(arg, **scenes, **fields), workdir=Workdir(tmp_path / "run"))

    make.asked = asked
    return make


def settings_of(job, **fields):
    return PostprocessSettings(**(job.config.postprocess.to_dict() | fields))


def test_a_calibration_and_its_file(make_job):
    job = make_job()
    found = calibrate(job, settings_of(job))
    assert make_job.asked == ["scenes/calibration"]
    np.testing.assert_allclose(found["temperature"], 2, rtol=0.6)  # 30 boxes
    assert found["temperature"] == found["factors"]["coverage"]
    file = job.workdir.path / "calibration" / "6.json"
    stored = read_json(file)
    assert stored["temperature"] == found["temperature"]
    assert stored["data"] == "scenes/calibration"
    assert stored["data_fingerprint"] == job.calibration_source.fingerprint
    assert stored["postprocess"] == vars(settings_of(job))
    assert (stored["step"], stored["seed"], stored["method"]) == (6, 0, "coverage")
    assert stored["num_matched"] == sum(len(record.boxes) for record in job.calibration_source.records)
    assert abs(stored["after"]["coverage_1sigma"] - 0.68) < abs(stored["before"]["coverage_1sigma"] - 0.68)
    loaded = load_temperature(job.workdir, 6, settings_of(job))
    np.testing.assert_array_equal(loaded, found["temperature"])
    assert loaded.shape == (4,)


def test_intervals_and_their_file(make_job):
    job = make_job()
    calibrate(job, settings_of(job))
    stored = read_json(job.workdir.path / "calibration" / "6.intervals.json")
    count = sum(len(record.boxes) for record in job.calibration_source.records)
    assert (stored["num_labels"], stored["num_images"]) == (count, len(job.calibration_source.records))
    assert stored["data"] == "scenes/calibration"
    assert stored["data_fingerprint"] == job.calibration_source.fingerprint
    assert stored["postprocess"] == vars(settings_of(job))
    assert (stored["step"], stored["iou_threshold"]) == (6, 0.5)
    assert "90 % of matched boxes" in stored["promise"]
    loaded = load_edge_calibration(job.workdir, 6, settings_of(job))
    assert loaded.to_dict() == {key: stored[key] for key in loaded.to_dict()}
    # The sigmas are half as large as the errors are.
    assert loaded.intervals(0.5).factors[0, 0] > 2
    assert load_edge_calibration(job.workdir, 3, settings_of(job)) is None


def test_intervals_hold_for_one_post_processing(make_job, caplog):
    job = make_job()
    calibrate(job, settings_of(job))
    for fields in ({"voting": "none"}, {"score_threshold": 0.7}, {"detections_per_image": 3}):
        assert load_edge_calibration(job.workdir, 6, settings_of(job, **fields)) is None
        assert f"under {next(iter(fields))} " in caplog.messages[-1]
        assert "there are no intervals; calibrate again with --mode=calibrate" in caplog.messages[-1]
    assert load_edge_calibration(job.workdir, 6, settings_of(job), data="scenes/calibration") is None
    assert "fitted on scenes/calibration, whose images are evaluated here" in caplog.messages[-1]
    assert load_edge_calibration(job.workdir, 6, settings_of(job), data="scenes/validation") is not None


@pytest.mark.parametrize("content", [{}, [], {"postprocess": {}, "ratios": [1.0], "scores": [2.0, 1.0]}])
def test_damaged_intervals_are_named(make_job, content):
    job = make_job()
    write_json(edge_calibration_file(job.workdir, 6), content)
    with pytest.raises(WorkdirError, match=r"6\.intervals\.json does not hold intervals"):
        load_edge_calibration(job.workdir, 6, settings_of(job))


def test_the_method_and_the_step_are_those_asked_for(make_job):
    job = make_job(**{"calibrate.method": "likelihood"})
    found = calibrate(job, settings_of(job), step=3)
    assert found["temperature"] == found["factors"]["likelihood"] != found["factors"]["coverage"]
    assert load_temperature(job.workdir, 3, settings_of(job)) is not None
    assert load_temperature(job.workdir, 6, settings_of(job)) is None


def test_several_settings_from_one_pass(make_job):
    job = make_job()
    settings = {name: settings_of(job, **fields) for name, fields in NAMED.items()}
    found = fit_temperatures(job, settings)
    assert make_job.asked == ["scenes/calibration"]
    assert {name: entry["postprocess"]["voting"] for name, entry in found.items()} == {
        "plain": "none",
        "full": "variance",
    }
    assert not job.workdir.path.exists()


def test_a_share_of_the_training_set(make_job):
    job = make_job(**{"data.hold_out": 0.3})
    found = calibrate(job, settings_of(job))
    assert found["data"] == "scenes/train, held out 0.3"
    ids = [{record.image_id for record in s.records} for s in (job.train_source, job.calibration_source)]
    assert ids[0].isdisjoint(ids[1])
    assert len(ids[0] | ids[1]) == 24


@pytest.mark.parametrize(
    ("arg", "fields", "message"),
    [
        ("loss=kl", {"data.eval_split": "calibration"}, r"has images of config\.data\.eval_split"),
        ("loss=kl", {"data.calibration_split": "train"}, r"has images of config\.data\.train_split"),
        ("loss=kl", {"data.calibration_split": ""}, "there are no images to calibrate on"),
        ("loss=smooth_l1", {}, "'smooth_l1' predicts no variances"),
        ("loss=kl", {"calibrate.method": "loud"}, "'loud' is unknown; choose coverage or likelihood"),
        (
            "loss=kl",
            {"data.hold_out": 0.3, "data.eval_split": "train"},
            r"images of scenes/train, held out 0\.3 are in scenes/train too",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(make_job, arg, fields, message):
    job = make_job(arg, **fields)
    with pytest.raises(ValueError, match=message):
        calibrate(job, settings_of(job))
    assert not job.workdir.path.exists()


@pytest.mark.parametrize(("field", "value"), [("hold_out", 0.3), ("train_split", "validation")])
def test_the_config_must_be_that_of_the_training(make_job, field, value):
    job = make_job(**{f"data.{field}": value})
    trained = make_job().config.to_dict()
    del trained["data"]["hold_out"]  # a run of a time without it
    write_json(job.workdir.config, trained)
    with pytest.raises(ValueError, match=rf"config\.data\.{field} = {value!r}, but .* was trained with"):
        calibrate(job, settings_of(job))
    calibrate(make_job(), settings_of(job))


def test_other_voting_has_another_temperature(make_job, caplog):
    job = make_job()
    calibrate(job, settings_of(job))
    assert load_temperature(job.workdir, 6, settings_of(job, score_threshold=0.7)) is not None
    for fields in ({"voting": "none"}, {"voting_variance": "fused"}, {"suppression": "hard"}):
        assert load_temperature(job.workdir, 6, settings_of(job, **fields)) is None
        assert f"{next(iter(fields))} " in caplog.messages[-1]
        assert "calibrate again with klbox calibrate" in caplog.messages[-1]


@pytest.mark.parametrize(
    "content", [{}, [], {"temperature": [1, 1, 1], "postprocess": {}}, {"temperature": 0, "postprocess": {}}]
)
def test_a_damaged_file_is_named(make_job, content):
    job = make_job()
    write_json(job.workdir.calibration_file(6), content)
    with pytest.raises(WorkdirError, match=r"6\.json does not hold a calibration"):
        load_temperature(job.workdir, 6, settings_of(job))


def test_an_evaluation_has_both(make_job):
    job = make_job()
    found = calibrate(job, settings_of(job))
    settings = {"": settings_of(job), "plain": settings_of(job, voting="none")}
    metrics = Evaluation(job, settings)({}, 6)
    stored = read_json(job.workdir.eval_dir(6) / "metrics.json")
    assert "uncertainty_calibrated" not in metrics["plain"]
    detections = read_json(job.workdir.eval_dir(6) / "detections.json")
    truth = job.eval_source.coco_ground_truth()
    # The detections are as the network gave them, and so is the first score.
    assert stored["uncertainty"] == evaluate_uncertainty(truth, detections)
    scaled = scale_stds(detections, np.array(found["temperature"]))
    assert stored["uncertainty_calibrated"] == evaluate_uncertainty(truth, scaled)
    assert stored["uncertainty_calibrated"]["NLL"] < stored["uncertainty"]["NLL"]
    assert 0 < stored["LRP"]["oLRP"] < 100
    assert stored["PDQ"]["min_score"] == 0.5
    above = sum(entry["score"] >= 0.5 for entry in detections)
    assert stored["PDQ"]["true_positives"] + stored["PDQ"]["false_positives"] == above
    assert 0 < stored["PDQ"]["PDQ"] < 100


def test_an_evaluation_has_intervals(make_job, caplog):
    job = make_job()
    calibrate(job, settings_of(job))
    settings = {"": settings_of(job), "plain": settings_of(job, voting="none")}
    with caplog.at_level("INFO", logger="absl"):
        metrics = Evaluation(job, settings)({}, 6)
    assert "intervals" not in metrics["plain"]
    stored = read_json(job.workdir.eval_dir(6) / "metrics.json")
    detections = read_json(job.workdir.eval_dir(6) / "detections.json")
    calibration = load_edge_calibration(job.workdir, 6, settings_of(job))
    measured = evaluate_edge_calibration(job.eval_source.coco_ground_truth(), detections, calibration)
    assert {key: stored[key] for key in measured} == measured
    assert "90 % of matched boxes" in stored["intervals"]["promise"]
    assert 0.6 < stored["intervals"]["0.9"]["coverage"] <= 1
    assert any("90 %: " in message and "of boxes" in message for message in caplog.messages)
    assert calibration.with_intervals(detections) == detections
    plain = read_json(job.workdir.eval_dir(6) / "plain" / "detections.json")
    assert "bbox_interval_90" not in plain[0]
