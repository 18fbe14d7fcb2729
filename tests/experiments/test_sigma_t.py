import json

import pytest
from absl.testing import flagsaver

from experiments import networks, runs, sigma_t
from klbox_jax.files import write_json


def fake(name):
    metrics = {"AP": 40.0, "AP50": 70.0, "AP75": 40.0, "AP80": 30.0, "AP90": 10.0}
    return metrics | {
        "name": name,
        "data": "scenes/validation",
        "data_fingerprint": "f",
        "seed": 0,
        "steps": 9,
    }


def test_rows():
    values = [row.settings["sigma_t"] for row in sigma_t.ROWS[1:]]
    assert values == sorted(set(values))
    assert {0.0025, 0.005, 0.01, 0.02, 0.05, 0.1} <= set(values)
    config = runs.load_config(runs.SCENES_CONFIG, "loss=kl", {})
    found = [runs.postprocess_settings(config, row) for row in sigma_t.ROWS]
    assert [s.voting for s in found] == ["none"] + ["variance"] * len(values)
    assert [s.sigma_t for s in found[1:]] == values
    assert {s.suppression for s in found} == {"hard"}
    assert len({row.name for row in sigma_t.ROWS}) == len(sigma_t.ROWS)


def test_the_network_is_that_of_table_5(tmp_path, monkeypatch):
    asked = []

    def train_and_evaluate(network, rows):
        asked.append(network)
        return [fake(row.name) for row in rows]

    monkeypatch.setattr(networks, "train_and_evaluate", train_and_evaluate)
    with flagsaver.flagsaver(workdir=str(tmp_path)):
        sigma_t.main(["sigma_t"])
    assert asked == [networks.Network("one_level", "kl")]
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["sigma_t"] for row in table["rows"]] == [None, *sigma_t.SIGMA_TS]
    text = (tmp_path / "table.md").read_text()
    assert "| no voting | 40.00 | 70.00 |" in text
    assert "| 0.0025    | 40.00 |" in text
    assert (tmp_path / "sigma_t.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_taken_as_it_is(tmp_path, monkeypatch):
    config = runs.load_config(runs.SCENES_CONFIG, "loss=gaussian_nll", {"seed": 4})
    write_json(tmp_path / "run" / "config.json", config.to_dict())

    def evaluate_rows(config, workdir, step, rows):
        assert (config.seed, workdir, step) == (4, tmp_path / "run", 7)
        assert config.model.box_loss == "gaussian_nll"
        assert config.is_locked
        return {row.name: fake(row.name) for row in rows}

    monkeypatch.setattr(sigma_t, "restore_params", lambda folder: (7, {}))
    monkeypatch.setattr(runs, "evaluate_rows", evaluate_rows)
    with flagsaver.flagsaver(run_workdir=str(tmp_path / "run"), workdir=str(tmp_path / "table")):
        sigma_t.main(["sigma_t"])
    assert len(json.loads((tmp_path / "table" / "table.json").read_text())["rows"]) == len(sigma_t.ROWS)
    with (
        flagsaver.flagsaver(run_workdir=str(tmp_path)),
        pytest.raises(ValueError, match=r"is not the folder of a run: it has no config\.json"),
    ):
        sigma_t.main(["sigma_t"])


@pytest.mark.parametrize("preset", sigma_t.FAMILIES)
def test_a_dry_run_prints_one_command(preset, capsys):
    with flagsaver.flagsaver(preset=preset, dry_run=True):
        sigma_t.main(["sigma_t"])
    assert capsys.readouterr().out.count("python -m klbox_jax.main") == 1
