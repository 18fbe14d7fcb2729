"""A small cut of the shipped scenes: train, die, resume, evaluate."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from klbox_jax.errors import WorkdirError
from klbox_jax.files import read_json
from klbox_jax.main import run
from klbox_jax.train import loop
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics
from tests.thin import scenes_config

pytestmark = pytest.mark.four_devices

ROOT = pathlib.Path(__file__).parents[2]
# Trains as the command line does. Told to stop in its second step, it ends with a status; started again, it goes on
# from there, and is killed when it asks for the sixth batch: the fifth step is then running, the fourth is recorded,
# the third is saved.
KILLED = """
import os, signal, sys
from absl import flags
from klbox_jax.main import report_user_errors, run
from klbox_jax.train import loop
from tests.thin import scenes_config

flags.FLAGS.mark_as_parsed()
original = loop.train_batches

class Deadly:
    def __init__(self, batches):
        self.batches, self.count = batches, 0
    def __next__(self):
        self.count += 1
        if self.count == death[0]:
            os.kill(os.getpid(), death[1])
        return next(self.batches)
    def close(self):
        self.batches.close()

loop.train_batches = lambda *args, **kwargs: Deadly(original(*args, **kwargs))
config = scenes_config("loss=kl", **{"data.root": sys.argv[1]})
program = report_user_errors(lambda argv: run(config, sys.argv[2], "train"))
for death in ((2, signal.SIGTERM), (4, signal.SIGKILL)):
    try:
        program(["program"])
    except SystemExit as stop:
        print("status", stop.code, os.listdir(sys.argv[2] + "/checkpoints"), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def config(folder):
    return scenes_config("loss=kl", **{"data.root": str(folder / "scenes")})


@pytest.fixture(scope="module")
def straight(folder, config):
    """A run in one go, and the metrics that it returned."""
    metrics = run(config, str(folder / "straight"), "train_and_eval")
    return Workdir(folder / "straight"), metrics


@pytest.fixture(scope="module")
def killed(folder, config, straight):
    """The folder of a run that was told to stop in its second step, resumed, and killed after its fifth."""
    variables = {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    process = subprocess.run(
        [sys.executable, "-c", KILLED, config.data.root, str(folder / "killed")],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    (line,) = process.stdout.splitlines()
    assert line.startswith("status 143 [")
    assert "'2'" in line
    assert f"stopped by SIGTERM: {folder / 'killed'} is at step 2 of 6, which is saved" in process.stderr
    return Workdir(folder / "killed")


def copied(workdir, path):
    shutil.copytree(workdir.path, path)
    return Workdir(path)


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def training_records(workdir):
    clocks = ("time", "train/seconds", "train/data_wait_share")
    return [
        {name: value for name, value in record.items() if name not in clocks}
        for record in read_metrics(workdir.metrics)
        if "train/total_loss" in record
    ]


def final_state(config, workdir):
    return jax.device_get(loop.train(Job(config=config, workdir=workdir)))


def test_what_a_run_leaves(straight, config):
    workdir, _ = straight
    assert {path.name for path in workdir.path.iterdir()} >= {
        "config.json",
        "versions.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "eval",
    }
    assert read_json(workdir.config)["model"]["box_loss"] == "kl"
    records = [record for record in read_metrics(workdir.metrics) if "train/total_loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        losses = [
            record[f"train/{name}"] for name in ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg")
        ]
        np.testing.assert_allclose(record["train/total_loss"], sum(losses), rtol=1e-5)
        assert record["train/mean_sigma"] > 0
        assert 0 <= record["train/data_wait_share"] <= 1
        assert record["train/grad_norm"] > 0
    seconds = [record["train/seconds"] for record in records]
    assert seconds == sorted(seconds)
    # A quarter of the shipped rate, for 4 images instead of 16, where the warm-up begins.
    first_rate = config.optimizer.learning_rate / 4 * config.optimizer.warmup_factor
    np.testing.assert_allclose(records[0]["train/learning_rate"], first_rate, rtol=1e-5)


def test_the_evaluation_of_a_run(straight, config):
    workdir, returned = straight
    folder = workdir.eval_dir(6)
    metrics, detections = read_json(folder / "metrics.json"), read_json(folder / "detections.json")
    assert metrics.items() >= {"step": 6, "seed": 0, "data": "scenes/validation"}.items()
    assert metrics["postprocess"]["voting"] == "variance"
    assert metrics["versions"]["jax"] == jax.__version__
    assert {"AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "AP_by_iou", "AP_by_class"} <= set(metrics)
    assert metrics["AP"] == returned[""]["AP"]
    assert {entry["image_id"] for entry in detections} == {1_000_001 + i for i in range(8)}
    for entry in detections:
        assert set(entry) >= {"image_id", "category_id", "bbox", "score", "bbox_std"}
        assert len(entry["bbox"]) == len(entry["bbox_std"]) == 4
        assert min(entry["bbox"]) >= 0
        assert min(entry["bbox_std"]) > 0
    logged = [record for record in read_metrics(workdir.metrics) if "val/AP" in record]
    assert [record["step"] for record in logged] == [6]


def test_a_stopped_and_killed_run_goes_on_bit_for_bit(straight, killed, config, tmp_path):
    workdir = copied(killed, tmp_path / "resumed")
    assert Checkpoints(workdir.checkpoints, max_to_keep=2).steps() == [2, 3]
    assert [record["step"] for record in training_records(workdir)] == [1, 2, 3, 4]
    run(config, str(workdir.path), "train")
    expected = final_state(config, straight[0])
    found = final_state(config, workdir)
    assert int(found.step) == 6
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert training_records(workdir) == training_records(straight[0])


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(killed, config, tmp_path, monkeypatch):
    workdir = copied(killed, tmp_path / "poisoned")
    before = digests(workdir.checkpoints)
    original = loop.init_or_restore

    def poisoned(*arguments):
        state, compiling = original(*arguments)
        assert int(state.step) == 3
        poison = jax.tree.map(lambda x: x * np.float32(np.nan), state.params)
        return state.replace(params=poison), compiling

    monkeypatch.setattr(loop, "init_or_restore", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"^step 4: .*total_loss.* not finite, on images \[\d+(, \d+){3}\]"
    ):
        run(config, str(workdir.path), "train")
    assert digests(workdir.checkpoints) == before
    last = json.loads(workdir.metrics.read_text().splitlines()[-1])
    assert last["step"] == 4
    assert last["train/total_loss"] is None
    assert last["nonfinite"]["train/total_loss"] == "nan"


def test_a_folder_of_another_config_is_refused(straight, config, folder):
    workdir, _ = straight
    before = digests(workdir.path)
    other = scenes_config("loss=smooth_l1", **{"data.root": str(folder / "scenes"), "seed": 1})
    with pytest.raises(WorkdirError, match="belongs to a run with another config") as caught:
        run(other, str(workdir.path), "train")
    assert '  model.box_loss: was "kl", now "smooth_l1"' in str(caught.value)
    assert "  seed: was 0, now 1" in str(caught.value)
    after = digests(workdir.path)
    assert {name for name in after if after[name] != before.get(name)} <= {".lock"}
    assert before.keys() <= after.keys()


def test_eval_alone_reads_the_newest_checkpoint(straight, config, monkeypatch):
    # The compiled step is that of training's end, so what it would do is only looked at.
    from klbox_jax.train import run_evaluation as evaluation

    seen = []

    @dataclasses.dataclass
    class Recorder:
        job: Job
        settings: dict
        preemption: object

        def __call__(self, params, step):
            seen.append((self.settings, params, step))
            return {"": {"AP": 1.0}}

    monkeypatch.setattr(evaluation, "Evaluation", Recorder)
    assert run(config, str(straight[0].path), "eval") == {"": {"AP": 1.0}}
    ((settings, params, step),) = seen
    assert step == 6
    assert settings[""].voting == "variance"
    expected = final_state(config, straight[0]).params
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_unknown_mode_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="mode 'fly' is unknown; choose one of train, eval, train_and_eval"):
        run(config, str(tmp_path / "run"), "fly")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_share_is_refused(folder, tmp_path):
    config = scenes_config("loss=kl", **{"data.root": str(folder / "scenes"), "train.batch_size": 6})
    message = "config.train.batch_size = 6 cannot be shared evenly by 4 devices; make it a multiple of 4"
    with pytest.raises(ValueError, match=message):
        run(config, str(tmp_path / "run"), "train")
    assert not (tmp_path / "run").exists()
