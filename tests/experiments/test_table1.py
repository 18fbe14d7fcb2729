import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import runs, table1
from klbox_jax.evaluation import eval_step as evaluate
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train import loop
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir
from tests.thin import scenes_config

NAMES = ("baseline", "soft_nms", "kl", "kl_voting", "kl_soft_nms", "kl_voting_soft_nms")


def test_the_rows_are_those_of_the_paper():
    assert tuple(row.name for row in table1.ROWS) == NAMES
    assert [(row.loss, row.suppression, row.voting) for row in table1.ROWS] == [
        ("smooth_l1", "hard", "none"),
        ("smooth_l1", "soft_gaussian", "none"),
        ("kl", "hard", "none"),
        ("kl", "hard", "variance"),
        ("kl", "soft_gaussian", "none"),
        ("kl", "soft_gaussian", "variance"),
    ]


@pytest.mark.parametrize("preset", runs.CONFIGS)
def test_the_rows_share_everything_but_loss_and_postprocessing(preset):
    fields = {"seed": 3}
    configs = {loss: runs.load_config(runs.CONFIGS[preset], f"loss={loss}", fields) for loss in table1.LOSSES}
    for loss, config in configs.items():
        assert config.is_locked
        assert config.seed == 3
        assert config.model.box_loss == loss
    plain = {loss: config.to_dict() for loss, config in configs.items()}
    for config in plain.values():
        del config["model"]["box_loss"]
        del config["postprocess"]["voting"]
    # So schedule, coder, data order and sampling are one and the same.
    assert plain["kl"] == plain["smooth_l1"]
    settings = [vars(runs.postprocess_settings(configs[row.loss], row)) for row in table1.ROWS]
    for row, values in zip(table1.ROWS, settings, strict=True):
        assert (values.pop("suppression"), values.pop("voting")) == (row.suppression, row.voting)
    assert all(values == settings[0] for values in settings)


def test_an_unknown_field_is_refused():
    with pytest.raises(KeyError, match="lerning_rate"):
        runs.load_config(runs.CONFIGS["mini"], "loss=kl", {"optimizer.lerning_rate": 1.0})


def test_the_aquarium_needs_its_files():
    assert flags.FLAGS.is_parsed()
    with flagsaver.flagsaver(preset="aquarium"):
        with pytest.raises(
            ValueError, match=r"--preset=aquarium needs --data_root=FOLDER and --init_weights=FILE\.pth"
        ):
            table1.overrides(0)
        with flagsaver.flagsaver(data_root="pond", init_weights="w.pth"):
            found = table1.overrides(0)
            assert found.items() >= {"seed": 0, "data.root": "pond", "model.init_weights": "w.pth"}.items()
            assert found["model.box_loss_settings.ramp_steps"] == 684


def test_a_dry_run_prints_two_commands(tmp_path, capsys):
    with flagsaver.flagsaver(workdir=str(tmp_path / "table"), dry_run=True, seed=5):
        table1.main(["table1"])
    lines = capsys.readouterr().out.splitlines()
    assert [
        f"--config=configs/scenes.py:loss={loss} " in line
        for loss, line in zip(table1.LOSSES, lines, strict=True)
    ]
    assert all("--config.seed=5" in line and "--mode=train_and_eval" in line for line in lines)
    assert not (tmp_path / "table").exists()


def test_a_dry_run_in_the_papers_setting_needs_no_files(capsys):
    with flagsaver.flagsaver(preset="full", dry_run=True, num_epochs=2.0):
        table1.main(["table1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "--config=configs/faster_rcnn_vgg16.py:loss=" in line
        assert "--config.train.num_epochs=2.0 --config.train.num_steps=0" in line
        assert "--config.data.root=DATA_ROOT --config.model.init_weights=INIT_WEIGHTS" in line


@pytest.fixture(scope="module")
def thin_table(tmp_path_factory):
    """The whole program on a thin network, six steps a training."""
    folder = tmp_path_factory.mktemp("table1")

    def load_config(path, arg, fields):
        assert path == "configs/scenes.py"
        return scenes_config(arg, **(fields | {"data.root": str(folder / "scenes")}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_config", load_config)
        with flagsaver.flagsaver(workdir=str(folder / "table")):
            table1.main(["table1"])
        yield folder / "table"


def test_the_table(thin_table):
    table = json.loads((thin_table / "table.json").read_text())
    assert table["preset"] == "mini"
    assert table["data"] == "scenes/validation"
    assert len(table["data_fingerprint"]) == 64
    assert tuple(row["name"] for row in table["rows"]) == NAMES
    for row, expected in zip(table["rows"], table1.ROWS, strict=True):
        assert (row["loss"], row["suppression"], row["voting"]) == (
            expected.loss,
            expected.suppression,
            expected.voting,
        )
        assert {"AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "AP_by_iou", "AP_by_class"} <= set(row)
        assert row.items() >= {"seed": 0, "steps": 6}.items()
        assert row["versions"]["jax"]
        assert row["seconds"] > 0
        assert row["postprocess"]["suppression"] == expected.suppression
        assert row["postprocess"]["voting"] == expected.voting
    text = (thin_table / "table.md").read_text()
    assert all(f"| {name} " in text for name in NAMES)
    for picture, magic in (("ap_over_iou.png", b"\x89PNG"), ("detections.jpg", b"\xff\xd8\xff")):
        assert (thin_table / picture).read_bytes().startswith(magic)
    plans = [json.loads((thin_table / loss / "config.json").read_text())["data"] for loss in table1.LOSSES]
    assert plans[0] == plans[1]


def test_what_is_finished_is_skipped(thin_table, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(loop, "train_batches", never)
    monkeypatch.setattr(evaluate, "eval_step", never)
    before = json.loads((thin_table / "table.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in thin_table.glob("*/eval/**/*.json")}
    assert len(times) == 12
    (thin_table / "table.json").unlink()
    with flagsaver.flagsaver(workdir=str(thin_table)):
        table1.main(["table1"])
    assert json.loads((thin_table / "table.json").read_text()) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_lost_evaluation_is_made_again_from_the_checkpoint(thin_table, monkeypatch):
    folder = thin_table / "smooth_l1"
    lost = folder / "eval" / "6" / "soft_nms" / "metrics.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    config = runs.load_config("configs/scenes.py", "loss=smooth_l1", {"seed": 0})
    rows = runs.train_and_evaluate(config, folder, table1.rows_of("smooth_l1"))
    assert [row["name"] for row in rows] == ["baseline", "soft_nms"]
    after = json.loads(lost.read_text())
    assert {**after, "eval_seconds": 0} == {**before, "eval_seconds": 0}
    assert Job(config=config, workdir=Workdir(folder)).total_steps == 6
    assert PostprocessSettings(**after["postprocess"]) == runs.postprocess_settings(config, table1.ROWS[1])
