import json

import pytest
from absl.testing import flagsaver

from experiments import beyond, runs, seeds, table1
from klbox_jax.evaluation import eval_step as evaluate
from klbox_jax.files import write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir
from tests.serving.thin_run import write_run
from tests.thin import scenes_config


def test_every_setting_is_one():
    for preset in ("mini", "aquarium"):
        config = runs.load_config(runs.CONFIGS[preset], "loss=kl", {})
        for name, fields in beyond.SETTINGS.items():
            found = runs.postprocess_settings(config, beyond.row_of(name, fields, config))
            found.check_head(has_variances=True, has_iou_head=False)
            assert all(getattr(found, key) == value for key, value in fields.items())
            assert found.pre_nms_topk == config.postprocess.pre_nms_topk * (1 + found.flip)
    assert beyond.SETTINGS["ours"] == beyond.OURS
    assert beyond.SETTINGS["ours_flip"] == beyond.OURS_FLIP
    assert beyond.SETTINGS["flip"] == beyond.SETTINGS["paper"] | {"flip": True}
    distinct = [PostprocessSettings(**fields) for fields in beyond.SETTINGS.values()]
    assert len(set(distinct)) == len(distinct)
    # The paper's row is the one to beat, and the only one with its fields.
    full = next(row for row in table1.ROWS if row.name == beyond.PAPER)
    assert beyond.SETTINGS["paper"] == {"suppression": full.suppression, "voting": full.voting}


def test_the_seed_of_the_choice_is_not_reported():
    with flagsaver.flagsaver(seeds=5):
        assert list(beyond.seeds_of_report()) == [1, 2, 3, 4]
        with flagsaver.flagsaver(preset="aquarium"):
            assert list(beyond.seeds_of_report()) == [0, 1, 2, 3, 4]
    with flagsaver.flagsaver(seeds=1), pytest.raises(ValueError, match="--seeds=1 leaves no network"):
        beyond.seeds_of_report()


def test_photographs_have_no_part_in_the_choice(tmp_path):
    with (
        flagsaver.flagsaver(preset="aquarium", stage="choose", workdir=str(tmp_path)),
        pytest.raises(ValueError, match="beyond --stage=choose has no preset aquarium; choose mini"),
    ):
        beyond.main(["beyond"])


@pytest.mark.parametrize("stage", ["choose", "report"])
def test_networks_that_are_missing_are_named(stage, tmp_path):
    with (
        flagsaver.flagsaver(stage=stage, workdir=str(tmp_path), seeds=3),
        pytest.raises(
            ValueError, match=r"seed\d.* has no .*python -m experiments\.table1 .*--seeds=3 --workdir="
        ),
    ):
        beyond.main(["beyond"])


@pytest.fixture(scope="module")
def thin_runs(tmp_path_factory):
    """Two networks that were never trained, in the place of Table 1's, then both stages, with three settings."""
    folder = tmp_path_factory.mktemp("beyond")
    workdir = folder / "table"

    def load_config(path, arg, fields):
        assert path == "configs/scenes.py"
        return scenes_config(arg, **(fields | {"data.root": str(folder / "scenes")}))

    def write_table():
        entries = []
        for row in (table1.ROWS[0], table1.ROWS[-1]):
            config = load_config("configs/scenes.py", f"loss={row.loss}", {"seed": 1})
            network = workdir / "seed1" / row.loss
            names = Job(config=config, workdir=Workdir(network)).eval_source.class_names
            categories = [{"name": name, "id": i + 1} for i, name in enumerate(names)]
            write_run(network, config, steps=(6,), categories=categories)
            metrics = runs.evaluate_rows(config, network, 6, [row])
            entries.append(row.labels() | metrics[row.name] | {"seed": 1, "steps": 6, "seconds": 1.0})
        write_json(workdir / "seed1" / "table.json", {"rows": entries})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_config", load_config)
        patch.setattr(seeds, "NUM_RESAMPLES", 20)
        three = {name: beyond.SETTINGS[name] for name in ("paper", "ours", "ours_flip")}
        patch.setattr(beyond, "SETTINGS", three)
        with flagsaver.flagsaver(workdir=str(workdir), seeds=2):
            write_table()
            networks = sorted(workdir.rglob("*"))
            with flagsaver.flagsaver(stage="choose", seed=1):
                beyond.main(["beyond"])
            chosen = sorted(workdir.rglob("*"))
            with flagsaver.flagsaver(stage="report"):
                beyond.main(["beyond"])
            yield workdir, set(chosen) - set(networks)


def test_the_choice(thin_runs):
    workdir, written = thin_runs
    # What is found on the calibration images lies nowhere near what is reported.
    assert written
    assert {path.relative_to(workdir).parts[0] for path in written} == {"beyond"}
    found = json.loads((workdir / "beyond" / "choose.json").read_text())
    assert found["data"] == "scenes/calibration"
    assert found["settings tried"] == 3
    assert {row["name"] for row in found["rows"]} == set(beyond.SETTINGS)
    assert [row["AP"] for row in found["rows"]] == sorted((row["AP"] for row in found["rows"]), reverse=True)
    assert found["best"] in ("paper", "ours")
    assert found["best_flip"] == "ours_flip"
    assert {row["postprocess"]["flip"] for row in found["rows"]} == {False, True}
    text = (workdir / "beyond" / "choose.md").read_text()
    assert "of the 3 settings that were tried" in text
    assert "score_by_std=4.0, flip=True, pre_nms_topk=128" in text


def test_the_report(thin_runs):
    workdir, _ = thin_runs
    found = json.loads((workdir / "beyond" / "beyond.json").read_text())
    assert found["data"] == "scenes/validation"
    assert [row["name"] for row in found["rows"]] == ["baseline", beyond.PAPER, "ours", "flip", "ours_flip"]
    assert all(row["seeds"] == [1] for row in found["rows"])
    assert {(one["row"], one["base"]) for one in found["differences"]} == set(beyond.PAIRS)
    assert set(found["spearman"]) == {row["name"] for row in found["rows"]}
    stored = json.loads((workdir / "seed1" / "table.json").read_text())["rows"]
    full = next(row for row in stored if row["name"] == beyond.PAPER)
    assert found["rows"][1]["AP"] == full["AP"]
    for name, fields in beyond.REPORTED.items():
        metrics = json.loads((workdir / "seed1" / "kl" / "eval" / "6" / name / "metrics.json").read_text())
        assert fields.items() <= metrics["postprocess"].items()
    text = (workdir / "beyond" / "beyond.md").read_text()
    for part in (
        "ours - kl_voting_soft_nms",
        "AP50 barely moves",
        "Spearman",
        "sigma_t=0.05, score_by_std=4.0",
    ):
        assert part in text
    assert (workdir / "beyond" / "ap_over_iou.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_skipped_and_other_settings_are_refused(thin_runs, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("nothing is left to do")

    workdir, _ = thin_runs
    monkeypatch.setattr(evaluate, "eval_step", never)
    for stage, name in (("choose", "choose.json"), ("report", "beyond.json")):
        file = workdir / "beyond" / name
        before = json.loads(file.read_text())
        file.unlink()
        with flagsaver.flagsaver(stage=stage, seed=int(stage == "choose")):
            beyond.main(["beyond"])
        assert json.loads(file.read_text()) == before
    monkeypatch.setitem(beyond.REPORTED, "ours", beyond.OURS | {"sigma_t": 0.1})
    with (
        flagsaver.flagsaver(stage="report"),
        pytest.raises(
            ValueError, match=r"ours/metrics\.json was made under other settings; delete .*ours and"
        ),
    ):
        beyond.main(["beyond"])


def test_a_training_that_was_cut_off_is_refused(thin_runs, monkeypatch):
    def load_config(path, arg, fields, load=runs.load_config):
        return load(path, arg, fields | {"train.num_steps": 9})

    monkeypatch.setattr(runs, "load_config", load_config)
    with (
        flagsaver.flagsaver(stage="choose", seed=1),
        pytest.raises(ValueError, match=r"seed1/kl is at step 6 of 9; finish it with python -m experiments"),
    ):
        beyond.main(["beyond"])
