"""A small cut of the shipped scenes: train, die, resume, evaluate."""

import dataclasses
import hashlib
import json
import signal

import jax
import numpy as np
import pytest

from klbox_jax.errors import WorkdirError
from klbox_jax.files import read_json
from klbox_jax.main import run
from klbox_jax.train import loop, run_evaluation
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics
from tests.bits import assert_same_bits
from tests.programs import run_python
from tests.serving.thin_run import copy_run
from tests.thin import scenes_config

pytestmark = pytest.mark.four_devices

# Trains as the command line does. SIGTERM in its second step ends it with a status. Started again, it goes on from
# there, and is killed when it asks for the sixth batch: the fifth step is then running, the fourth is recorded, the
# third is saved.
KILLED = """
import os, signal, sys
from absl import flags
from klbox_jax.cli import report_user_errors
from klbox_jax.main import run
from klbox_jax.train import loop
from tests.thin import scenes_config
from tests.train.acting_batches import acting_train_batches

flags.FLAGS.mark_as_parsed()
config = scenes_config("loss=kl", **{"data.root": sys.argv[1]})
program = report_user_errors(lambda argv: run(config, sys.argv[2], "train"))
for number, kind in ((2, signal.SIGTERM), (4, signal.SIGKILL)):
    loop.train_batches = acting_train_batches(number, lambda: os.kill(os.getpid(), kind))
    try:
        program(["program"])
    except SystemExit as stop:
        print("status", stop.code, os.listdir(sys.argv[2] + "/checkpoints"), flush=True)
"""


@pytest.fixture(scope="module")
def config(module_path):
    return scenes_config("loss=kl", **{"data.root": str(module_path / "scenes")})


@pytest.fixture(scope="module")
def straight(module_path, config):
    """A run in one go, and the metrics that it returned."""
    metrics = run(config, str(module_path / "straight"), "train_and_eval")
    return Workdir(module_path / "straight"), metrics


@pytest.fixture(scope="module")
def killed(module_path, config, straight):
    """The folder of a run that was stopped in its second step, resumed, and killed after its fifth."""
    folder = module_path / "killed"
    output, errors = run_python("-c", KILLED, config.data.root, folder, devices=4, status=-signal.SIGKILL)
    (line,) = output.splitlines()
    assert line.startswith("status 143 [")
    assert "'2'" in line
    assert f"stopped by SIGTERM: {folder} is at step 2 of 6, which is saved" in errors
    return Workdir(folder)


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
    return jax.device_get(loop.train(Job(config, workdir, trains=True)))


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
    workdir = copy_run(killed, tmp_path / "resumed")
    assert Checkpoints(workdir.checkpoints, max_to_keep=2).steps() == [2, 3]
    assert [record["step"] for record in training_records(workdir)] == [1, 2, 3, 4]
    run(config, str(workdir.path), "train")
    found = final_state(config, workdir)
    assert int(found.step) == 6
    assert_same_bits(found, final_state(config, straight[0]))
    assert training_records(workdir) == training_records(straight[0])


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(killed, config, tmp_path, monkeypatch):
    workdir = copy_run(killed, tmp_path / "poisoned")
    before = digests(workdir.checkpoints)
    original = loop.init_or_restore

    def poisoned(*arguments):
        state = original(*arguments)
        assert int(state.step) == 3
        return state.replace(params=jax.tree.map(lambda x: x * np.float32(np.nan), state.params))

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


def test_a_folder_of_another_config_is_refused(straight, config):
    workdir, _ = straight
    before = digests(workdir.path)
    other = scenes_config("loss=smooth_l1", **{"data.root": config.data.root, "seed": 1})
    with pytest.raises(WorkdirError, match="belongs to a run with another config") as caught:
        run(other, str(workdir.path), "train")
    assert 'model.box_loss was "kl", now "smooth_l1"' in str(caught.value)
    assert "seed was 0, now 1" in str(caught.value)
    after = digests(workdir.path)
    assert {name for name in after if after[name] != before.get(name)} <= {".lock"}
    assert before.keys() <= after.keys()


def test_eval_alone_reads_the_newest_checkpoint(straight, config, monkeypatch):
    # The compiled step is the same as at the end of the training, so that only its arguments are of interest.
    seen = []

    @dataclasses.dataclass
    class Recorder:
        job: Job
        settings: dict
        preemption: object

        def __call__(self, params, step):
            seen.append((self.settings, params, step))
            return {"": {"AP": 1.0}}

    monkeypatch.setattr(run_evaluation, "Evaluation", Recorder)
    assert run(config, str(straight[0].path), "eval") == {"": {"AP": 1.0}}
    ((settings, params, step),) = seen
    assert step == 6
    assert settings[""].voting == "variance"
    assert_same_bits(jax.device_get(params), final_state(config, straight[0]).params)


def test_an_unknown_mode_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="mode 'fly' is unknown; choose one of train, eval, train_and_eval"):
        run(config, str(tmp_path / "run"), "fly")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_share_is_refused(config, tmp_path):
    config = scenes_config("loss=kl", **{"data.root": config.data.root, "train.batch_size": 6})
    message = "config.train.batch_size = 6 cannot be shared evenly by 4 devices; make it a multiple of 4"
    with pytest.raises(ValueError, match=message):
        run(config, str(tmp_path / "run"), "train")
    assert not (tmp_path / "run").exists()
