"""`klbox` from a first training to named evaluations and calibrations, with a toy for the detector."""

import json
import logging
import shutil

import numpy as np
import pytest

from klbox_jax.command import program
from klbox_jax.files import read_json
from klbox_jax.models.build import build_model
from klbox_jax.train import extensions
from klbox_jax.train.best_checkpoint import is_evaluated, scores
from klbox_jax.train.run_evaluation import Evaluation
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics
from tests.coco_folder import write_folder
from tests.train.toy import share_programs, toy_config, use_toy

CONFIG = """
import pathlib
from tests.train.toy import toy_config


def get_config(arg=None):
    return toy_config(pathlib.Path({folder!r})).unlock()
"""


@pytest.fixture
def klbox(tmp_path, monkeypatch, capsys):
    """Runs the program in a folder with own data, and with a detector that finds every object, nearly."""
    share_programs(monkeypatch)
    use_toy(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        program, "_start", lambda mode, text, given=None: program._say(f"klbox {mode}: {text}")
    )
    toy_config(tmp_path)  # writes the data
    (tmp_path / "mine.py").write_text(CONFIG.format(folder=str(tmp_path)))

    def detections(self, params, source, plan, *, step):
        rng = np.random.default_rng(0)
        found = [
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": (np.array(entry["bbox"]) + rng.normal(0, 1, 4)).tolist(),
                "bbox_std": rng.uniform(0.4, 0.6, 4).tolist(),
                "score": 0.9,
            }
            for entry in source.coco_ground_truth()["annotations"]
        ]
        return {name: list(found) for name in self.names}

    monkeypatch.setattr(Evaluation, "detections", detections)
    # The toy has not the parameters of a whole detector.
    monkeypatch.setattr("klbox_jax.serving.model_folder.check_params", lambda *_, **__: None)

    def run(*arguments, status=0):
        found = program.main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        assert found == status, errors
        return output if not status else errors.splitlines()[-1].removeprefix("error: ")

    return run


@pytest.fixture
def trained(klbox):
    klbox("train", "runs/a", "--config=mine.py")
    return klbox


def tags(workdir="runs/a"):
    return set().union(*read_metrics(Workdir(workdir).metrics))


def test_a_training_calibrates_and_evaluates(klbox, tmp_path):
    output = klbox("train", "runs/a", "--config=mine.py")
    run = Workdir("runs/a")
    # One of 18 images is kept out.
    assert read_json(run.config)["data"]["hold_out"] == 0.1
    calibration = read_json(run.calibration_file(6))
    assert calibration["data"] == "pond/train, held out 0.1"
    assert calibration["num_matched"] == 2
    metrics = read_json(run.eval_dir(6) / "metrics.json")
    assert metrics["uncertainty_calibrated"]["NLL"] < metrics["uncertainty"]["NLL"]
    first, *lines = output.splitlines()
    assert first == "look at:"
    for file in (
        run.eval_dir(6) / "metrics.json",
        run.calibration_file(6),
        run.metrics,
        run.checkpoints / "6",
    ):
        assert file.exists()
        assert any(line.startswith(f"  {file} ") for line in lines)
    assert any(line.startswith("  klbox report runs/a ") for line in lines)


def test_the_same_command_and_the_folder_alone_go_on(klbox):
    for arguments in (
        ["--config=mine.py", "--config.train.num_steps=2"],
        ["--config=mine.py", "--config.train.num_steps=2"],
        ["--config.train.num_steps=4", "--allow_config_change"],
        [],
    ):
        klbox("train", "runs/a", *arguments)
    run = Workdir("runs/a")
    assert read_json(run.config)["train"]["num_steps"] == 4
    assert read_json(run.config)["data"]["hold_out"] == 0.1
    assert (run.eval_dir(4) / "metrics.json").exists()
    # The other program reads the same folder.
    assert program.main_of_modes(["--workdir=runs/a", "--mode=train_and_eval"]) == 0
    assert program.main_of_modes(["--workdir=runs/a", "--mode=eval"]) == 0
    error = klbox("train", "runs/a", "--config.optimizer.learning_rate=0.5", status=1)
    assert "runs/a belongs to a run with another config: optimizer.learning_rate was " in error


def test_a_set_too_small_to_keep_images_out(klbox, tmp_path, caplog):
    shutil.rmtree(tmp_path / "pond")
    write_folder(tmp_path / "pond", images_per_shape=2)
    with caplog.at_level(logging.WARNING, "absl"):
        klbox("train", "runs/a", "--config=mine.py")
    assert "keeps 0 of the 6 images of pond/train out of the training" in caplog.text
    assert "here all images are trained on, and sigma is not calibrated" in caplog.text
    assert read_json("runs/a/config.json")["data"]["hold_out"] == 0.0
    assert not Workdir("runs/a").calibration_file(6).exists()
    # Said by the user, it is an error.
    assert "keeps 0 of the 6 images" in klbox(
        "train", "runs/b", "--config=mine.py", "--config.data.hold_out=0.1", status=1
    )
    assert not (tmp_path / "runs" / "b").exists()


def test_without_evaluation_and_calibration(klbox):
    klbox("train", "runs/a", "--config=mine.py", "--no-eval", "--no-calibrate")
    run = Workdir("runs/a")
    assert read_json(run.config)["data"]["hold_out"] == 0.0
    assert not run.eval_dir(6).exists()
    assert not run.calibration_file(6).exists()


def test_evaluations_have_names(trained):
    before = read_json("runs/a/eval/6/metrics.json")
    hard = "--config.postprocess.suppression=hard"
    error = trained("eval", "runs/a", hard, status=1)
    assert (
        "eval/6 holds an evaluation with suppression = 'soft_gaussian', now 'hard'. Give this one a name"
        in error
    )
    output = trained("eval", "runs/a", hard, "--name=hard")
    assert "eval/6/hard/metrics.json" in output
    assert "klbox report runs/a --name=hard" in output
    assert read_json("runs/a/eval/6/metrics.json") == before
    assert read_json("runs/a/eval/6/hard/metrics.json")["postprocess"]["suppression"] == "hard"
    assert {"val/AP", "val/hard/AP"} <= tags()
    # A named evaluation has no part in what is best, and does not count as that of the run.
    assert list(scores(Workdir("runs/a"), "AP")) == [6]
    assert is_evaluated(Workdir("runs/a"), 6)
    assert is_evaluated(Workdir("runs/a"), 6, ["hard"])
    assert not is_evaluated(Workdir("runs/a"), 6, ["soft"])
    trained("eval", "runs/a", hard, "--name=hard")
    error = trained("eval", "runs/a", "--config.postprocess.voting=none", "--name=hard", status=1)
    assert (
        "holds an evaluation under the name hard with suppression = 'hard', now 'soft_gaussian'; voting = "
        in error
    )
    assert "Give this one another name with --name=NAME, or delete " in error


def test_only_a_named_evaluation_is_not_that_of_the_run(trained):
    metrics = Workdir("runs/a").metrics
    metrics.write_text(json.dumps({"step": 6, "val/hard/AP": 3.0}) + "\n")
    assert not is_evaluated(Workdir("runs/a"), 6)


@pytest.mark.parametrize("name", ["a/b", "../a", ".", "a b", "x" * 101, "-a"])
def test_names_are_names_of_folders(trained, name):
    assert f"--name={name} cannot be the name of a folder" in trained(
        "eval", "runs/a", f"--name={name}", status=1
    )


@pytest.mark.parametrize("name", ["AP", "NLL", "metrics.json"])
def test_names_of_metrics_are_taken(trained, name):
    assert f"--name={name} is the name of a metric or a file" in trained(
        "eval", "runs/a", f"--name={name}", status=1
    )


def test_other_data_are_evaluated_under_a_name(trained, tmp_path):
    error = trained("eval", "runs/a", "--split=train", status=1)
    assert "holds an evaluation with data = 'pond/valid', now 'pond/train'" in error
    trained("eval", "runs/a", "--split=train", "--name=train")
    metrics = read_json("runs/a/eval/6/train/metrics.json")
    assert metrics["data"] == "pond/train"
    # Some of its images were calibrated on, so that calibrated stds are not reported of them.
    assert "uncertainty_calibrated" not in metrics
    write_folder(tmp_path / "lake", images_per_shape=1)
    trained("eval", "runs/a", "--data=lake", "--name=lake")
    metrics = read_json("runs/a/eval/6/lake/metrics.json")
    assert (metrics["data"], metrics["data_root"]) == ("lake/valid", "lake")
    assert "uncertainty_calibrated" in metrics
    # Under that name, another folder of the same name is another evaluation.
    write_folder(tmp_path / "far" / "lake", images_per_shape=1)
    assert "data_root = 'lake', now 'far/lake'" in trained(
        "eval", "runs/a", "--data=far/lake", "--name=lake", status=1
    )
    assert "--data=sea is not a folder" in trained("eval", "runs/a", "--data=sea", "--name=sea", status=2)


def test_any_labelled_folder_calibrates(trained, tmp_path):
    write_folder(tmp_path / "lake", images_per_shape=2, splits=("all",))
    for path in (tmp_path / "lake" / "all").iterdir():
        path.write_bytes(path.read_bytes() + b" ")  # other photographs
    output = trained("calibrate", "runs/a", "--data=lake")
    file = Workdir("runs/a").calibration_file(6)
    assert f"  {file} " in output
    assert read_json(file)["data"] == "lake/all"
    assert read_json(file)["num_matched"] == 12
    # Images of the training or of the evaluation are refused, wherever their copies are.
    shutil.copytree(tmp_path / "pond", tmp_path / "copy")
    for split, purpose in (("valid", "evaluated"), ("train", "trained")):
        error = trained("calibrate", "runs/a", "--data=copy", f"--split={split}", status=1)
        assert f"images of copy/{split} are in pond/{split} too, on which a is {purpose}" in error
    assert "copy has the splits train, valid; choose one with --split" in trained(
        "calibrate", "runs/a", "--data=copy", status=1
    )
    (tmp_path / "lake" / "annotations" / "instances_all.json").write_text(
        (tmp_path / "lake" / "annotations" / "instances_all.json").read_text().replace("ray", "cod")
    )
    error = trained("calibrate", "runs/a", "--data=lake", status=1)
    assert "was trained on the classes ('fish', 'ray'), but lake/all has ('fish', 'cod')" in error


def test_the_data_of_the_run_may_be_gone(trained, tmp_path, caplog):
    write_folder(tmp_path / "lake", images_per_shape=2, splits=("all",))
    shutil.rmtree(tmp_path / "pond")
    with caplog.at_level(logging.WARNING, "absl"):
        trained("calibrate", "runs/a", "--data=lake")
    assert (
        "split valid of the run cannot be read, so it is not known whether images of lake/all" in caplog.text
    )


def test_a_first_start_that_fails_leaves_nothing(klbox, tmp_path):
    """So that what the message advises, another config, can be started in the same folder."""
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for fields, message in (
        (["--config.model.init_weights=weights.pth"], "weights.pth"),
        (
            ["--config.optimizer.frozen=backbone"],
            "config.optimizer.frozen has 'backbone', which is no prefix",
        ),
    ):
        assert message in klbox("train", "runs/a", "--config=mine.py", *fields, status=1)
        assert not (tmp_path / "runs").exists()
    klbox("train", "runs/a", "--config=mine.py")


def test_the_config_is_checked_before_the_data(klbox, monkeypatch):
    monkeypatch.setattr(extensions, "build_model", build_model)  # the detector, not the toy
    fields = ["--config=mine.py", "--config.data.root=nowhere"]
    for field in (
        "model.box_loss=k1",
        "postprocess.voting=loud",
        "train.on_nonfinite=no",
    ):
        error = klbox("train", "runs/a", *fields, f"--config.{field}", status=1)
        assert field.partition("=")[2] in error
    assert "nowhere" in klbox("train", "runs/a", *fields, status=1)


def test_fewer_classes_are_named_before_shapes(trained, tmp_path):
    for split in ("train", "valid"):
        file = tmp_path / "pond" / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"] = content["categories"][:1]
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 3]
        file.write_text(json.dumps(content))
    error = trained("eval", "runs/a", "--name=few", status=1)
    assert "was trained on the classes ('fish', 'ray'), but pond/valid has ('fish',)" in error
