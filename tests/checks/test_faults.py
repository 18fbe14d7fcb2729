import hashlib
import json
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from checks import faults
from checks.faults_files import (
    damage,
    differences,
    different_arrays,
    half_written,
    last_recorded_step,
    lost_checkpoints,
    resumed_from,
    state_of,
    unfinished_saves,
    whole_steps,
)
from klbox_jax.train.checkpoints import Checkpoints, find_fault
from klbox_jax.train.state import TrainState

# More than its digest takes.
NUMBERS = b"0123456789" * 100


def make_step(checkpoints, name, *, digests=True):
    folder = checkpoints / name
    folder.mkdir(parents=True)
    (folder / "array").write_bytes(NUMBERS)
    if digests:
        digest = hashlib.sha256(NUMBERS).hexdigest()
        (folder / "digests.json").write_text(json.dumps({"array": digest}))
    return folder


def test_what_a_kill_leaves_of_a_save(tmp_path):
    assert whole_steps(tmp_path / "none") == []
    assert unfinished_saves(tmp_path / "none") == set()
    # Step 20 was being deleted, 80 and 100 were not whole yet, 60 was set aside before.
    for name in ("40", "60"):
        make_step(tmp_path, name)
    for name in ("20", "60.unsound", "80"):
        make_step(tmp_path, name, digests=False)
    (tmp_path / "100.orbax-checkpoint-tmp").mkdir()
    (tmp_path / ".saved_before").touch()
    assert whole_steps(tmp_path) == [40, 60]
    assert unfinished_saves(tmp_path) == {80, 100}


def test_lost_checkpoints(tmp_path):
    for name in ("40", "60"):
        make_step(tmp_path, name)
    assert lost_checkpoints(tmp_path, {20, 40, 60}, keep=2) == []
    assert lost_checkpoints(tmp_path, {20, 40, 60, 80}, keep=2) == [80]
    (tmp_path / "40" / "array").write_bytes(NUMBERS[:-1] + b"t")
    assert lost_checkpoints(tmp_path, {20, 40, 60}, keep=2) == [40]


def test_half_written_files(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text('{"AP": 1}')
    # A line without an end is what a kill may leave, and so is what orbax has not finished.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (tmp_path / "20.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "20.orbax-checkpoint-tmp" / "a.json").write_text("[")
    assert half_written(tmp_path) == []
    assert last_recorded_step(tmp_path) == 2
    (tmp_path / "eval" / "detections.json").write_text('[{"image_id": 1}')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3}\n')
    assert half_written(tmp_path) == ["eval/detections.json", "metrics.jsonl: '{\"st'"]


@pytest.mark.parametrize(
    ("log", "step"),
    [
        ("I1 loop.py:79] training a on scenes/train from step 40 to 200, batch 4 on 1 devices", 40),
        ("I1 loop.py:79] training a on scenes/train from step 0 to 200, batch 4 on 1 devices", 0),
        ("I1 loop.py:70] /runs/a is trained to its last step, 200", 200),
        ("Downloading from step", None),
    ],
)
def test_what_a_start_tells(log, step):
    assert resumed_from(log) == step


def test_a_damaged_file_is_another_file(tmp_path):
    for how in ("flip", "truncate"):
        folder = make_step(tmp_path, how)
        assert damage(folder, np.random.default_rng(0), how=how) == "array"
        content = (folder / "array").read_bytes()
        assert "array is not the file that was saved" in find_fault(folder)
        flipped = int.from_bytes(content, "big") ^ int.from_bytes(NUMBERS, "big")
        assert content == NUMBERS[:500] if how == "truncate" else flipped.bit_count() == 1


def test_runs_are_compared_to_the_bit(tmp_path):
    def make_run(name, *, momentum=0.5, loss=2.5, detections="[]"):
        folder = tmp_path / name
        state = TrainState(
            jnp.int32(20), {"w": jnp.array([1.0, jnp.nan])}, {"momentum": jnp.float32(momentum)}
        )
        with Checkpoints(folder / "checkpoints", max_to_keep=1) as checkpoints:
            checkpoints.save(state)
        (folder / "eval" / "20").mkdir(parents=True)
        (folder / "eval" / "20" / "detections.json").write_text(detections)
        record = {"step": 20, "time": hash(name), "train/seconds": len(name), "train/total_loss": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return folder

    reference = make_run("reference")
    assert set(state_of(reference / "checkpoints" / "20" / "default")) == {
        "['step']",
        "['params']['w']",
        "['opt_state']['momentum']",
    }
    assert differences(reference, make_run("same"), step=20) == []
    other = make_run("other", momentum=np.nextafter(np.float32(0.5), 1), loss=2.25, detections="[1]")
    assert differences(reference, other, step=20) == [
        "1 arrays of the state, ['opt_state']['momentum'] among them",
        "the losses of metrics.jsonl",
        "detections.json",
    ]
    damage(other / "checkpoints" / "20", np.random.default_rng(0), how="flip")
    (found,) = differences(reference, other, step=20)
    assert found.startswith("checkpoint 20: ")


def test_arrays_differ_by_dtype_shape_and_sign_of_zero():
    ones = {"a": np.ones(2, np.float32)}
    assert different_arrays(ones, {"a": np.ones(2, np.float32)}) == []
    assert different_arrays(ones, {"a": np.ones((2, 1), np.float32)}) == ["a"]
    assert different_arrays(ones, {**ones, "b": np.ones(1)}) == ["b"]
    zeros = {"a": np.zeros(1), "b": np.zeros(1)}
    assert different_arrays(zeros, {"a": -np.zeros(1), "b": np.zeros(1, int)}) == ["a", "b"]


# Saves twice; each part of a save waits for a line.
SAVER = """
import os, sys
folder = sys.argv[1] + "/checkpoints/"
os.makedirs(folder)
for step in ("20", "40"):
    os.mkdir(folder + step + ".orbax-checkpoint-tmp")
    input()
    os.rename(folder + step + ".orbax-checkpoint-tmp", folder + step)
    input()
    open(folder + step + "/digests.json", "w").close()
input()
"""


def test_the_beginning_of_a_save_is_seen(tmp_path):
    runner = faults.Faults(tmp_path, seed=0)
    run = tmp_path / "run"
    with faults.Started([sys.executable, "-c", SAVER, str(run)], stdin=subprocess.PIPE) as process:
        saves = runner.saves(process, run)
        next(saves)
        assert unfinished_saves(run / "checkpoints") == {20}
        process.stdin.write(b"\n\n")
        process.stdin.flush()
        next(saves)
        assert unfinished_saves(run / "checkpoints") == {40}
        assert whole_steps(run / "checkpoints") == [20]
    # The end of the block is that of the process.
    assert process.returncode == -signal.SIGKILL


def test_the_command_is_the_ordinary_one(tmp_path):
    command = faults.command(tmp_path / "run", tmp_path / "data")
    assert command[:4] == [
        sys.executable,
        "-m",
        "klbox_jax.main",
        "--config=configs/scenes.py:loss=kl,size=tiny",
    ]
    assert "--config.train.num_steps=200" in command
    assert "--config.train.save_every=20" in command
    assert command[-2:] == [f"--workdir={tmp_path / 'run'}", "--mode=train_and_eval"]
