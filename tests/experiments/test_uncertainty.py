import json
import types

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import runs, uncertainty
from experiments.networks import Network
from klbox_jax.evaluation.temperature import calibrate_detections
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.files import write_json
from tests.evaluation.test_uncertainty import drawn_set


def test_rows():
    assert [row.name for row in uncertainty.ROWS if row.loss == "smooth_l1"] == [
        "baseline",
        "baseline_soft_nms",
    ]
    config = runs.load_config(runs.SCENES_CONFIG, "loss=kl", {})
    settings = {
        row.name: runs.postprocess_settings(config, row) for row in uncertainty.ROWS if row.loss == "kl"
    }
    assert (settings["kl"].suppression, settings["kl"].voting) == ("hard", "none")
    assert [settings[f"kl_full{tag}"].voting_variance for tag in ("", "_fused", "_winner")] == [
        "average",
        "fused",
        "winner",
    ]
    assert {found.voting for name, found in settings.items() if name != "kl"} == {"variance"}


def test_the_test_split_is_reported_and_the_training_is_that_of_table_5():
    with flagsaver.flagsaver(preset="mini"):
        network = Network("one_level", "kl")
        config = uncertainty.config_of(network)
        assert (config.data.eval_split, config.data.calibration_split) == ("test", "calibration")
        assert network.config().data.eval_split == "validation"


class Scenes:
    """The drawn set as a source; of each image one edge is hidden and another is blurred."""

    name, fingerprint = "scenes/test", "f"

    def __init__(self):
        self.truth, self.results = drawn_set(0, num_images=30, std_scale=0.5)
        edges = np.zeros((3, 4), np.float32)
        hidden, blur = edges.copy(), edges.copy()
        hidden[:, 0], blur[:, 1] = 0.9, 3.0
        self.details = [{"edge_hidden": hidden, "blur": blur} for _ in range(30)]

    def coco_ground_truth(self):
        return self.truth


def test_tables_and_figures(tmp_path, monkeypatch):
    source = Scenes()
    scores = evaluate_uncertainty(source.truth, source.results)
    fitted = calibrate_detections(source.truth, source.results, method="coverage")
    numbers = {"AP": 40.0, "AP50": 70.0, "AP90": 10.0, "LRP": {"oLRP": 60.0}, "PDQ": {"PDQ": None}}
    monkeypatch.setattr(uncertainty, "run", lambda config, workdir, mode: None)

    def evaluate_rows(config, workdir, step, rows):
        assert config.data.eval_split == "test"
        for row in rows:
            # As of a head that takes its score for the IoU.
            results = (
                [entry | {"predicted_iou": entry["score"]} for entry in source.results]
                if row.loss == "iou_net"
                else source.results
            )
            write_json(workdir / "eval" / str(step) / row.name / "detections.json", results)
        return {row.name: {**numbers, "uncertainty": scores} for row in rows}

    def make_job(config, workdir):
        loss = types.SimpleNamespace(has_variances=config.model.box_loss == "kl")
        heads = types.SimpleNamespace(roi_heads=types.SimpleNamespace(box_loss=loss))
        return types.SimpleNamespace(
            config=config, workdir=workdir, total_steps=9, model=heads, eval_source=source
        )

    def fit_temperatures(job, settings):
        return {name: fitted | {"data": "scenes/calibration"} for name in settings}

    monkeypatch.setattr(runs, "evaluate_rows", evaluate_rows)
    monkeypatch.setattr(runs, "job_of", make_job)
    monkeypatch.setattr(uncertainty, "fit_temperatures", fit_temperatures)
    out = tmp_path / "out"
    with flagsaver.flagsaver(preset="mini", workdir=str(out), networks_dir=str(tmp_path / "networks")):
        uncertainty.main(["uncertainty"])
    text = (out / "table.md").read_text()
    for name in ("reliability", "agreement", "hidden_edges"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.png").stat().st_size < 150_000
    table = json.loads((out / "table.json").read_text())
    assert [row["name"] for row in table["rows"]] == [row.name for row in uncertainty.ROWS]
    assert "calibration" not in table["rows"][0]
    assert [row["agreement"]["predicted_iou"] is None for row in table["rows"]] == [True] * 6 + [False]
    agreement = table["rows"][-1]["agreement"]
    assert agreement["predicted_iou"] == agreement["score"]
    assert table["calibrated on"] == "scenes/calibration"
    kl = table["rows"][2]
    assert kl["uncertainty_calibrated"]["coverage_1sigma"] == pytest.approx(0.683, abs=0.01)
    assert f"| kl             | raw        | {scores['NLL']:.3f} |" in text
    assert "| kl             | calibrated |" in text
    assert "| baseline          | smooth_l1 | hard          | none     | 40.0 |" in text
    assert table["edges"]["hidden"]["num"] == table["edges"]["blurred"]["num"] == 90
    lines = [line for line in text.splitlines() if line.startswith("| kl_full_fused")]
    # Precision, raw and calibrated, order, two methods, four kinds of detections.
    assert len(lines) == 1 + 2 + 1 + 2 + 4


def test_a_dry_run_prints_three_commands(capsys):
    with flagsaver.flagsaver(preset="mini", dry_run=True):
        uncertainty.main(["uncertainty"])
    assert capsys.readouterr().out.count("python -m klbox_jax.main") == 3
