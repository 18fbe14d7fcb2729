"""Two processes of two devices each on one machine, held against one process of four."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from klbox_jax.files import read_json
from klbox_jax.main import run
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics
from tests.thin import scenes_config

pytestmark = pytest.mark.four_devices

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import os, signal, sys
from absl import flags
from klbox_jax import distributed
from klbox_jax.main import report_user_errors, run
from klbox_jax.train import loop
from tests.thin import scenes_config

flags.FLAGS.mark_as_parsed()
root, workdir, address, number, dies_at = sys.argv[1:]
distributed.initialize(address, 2, int(number))

class Deadly:
    def __init__(self, batches):
        self.batches, self.count = batches, 0
    def __next__(self):
        self.count += 1
        if number == "1" and self.count == int(dies_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return next(self.batches)
    def close(self):
        self.batches.close()

original = loop.train_batches
loop.train_batches = lambda *args, **kwargs: Deadly(original(*args, **kwargs))
config = scenes_config("loss=kl", **{"data.root": root})
report_user_errors(lambda argv: run(config, workdir, "train_and_eval"))(["program"])
"""


def start(config, workdir, *, dies_at=0):
    """Starts both processes; the second kills itself when it asks for batch `dies_at`, 0 for never."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROGRAM,
                config.data.root,
                str(workdir),
                address,
                str(number),
                str(dies_at),
            ],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]


def finish(processes, *, timeout):
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return scenes_config("loss=kl", **{"data.root": str(tmp_path_factory.mktemp("scenes"))})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, config):
    """One process of four devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return Workdir(folder), run(config, str(folder), "train_and_eval")


def losses(workdir):
    return [
        {name: value for name, value in record.items() if name.startswith("train/loss")}
        for record in read_metrics(workdir.metrics)
        if "train/total_loss" in record
    ]


def assert_same_run(workdir, alone):
    expected, metrics = alone
    ours, theirs = losses(workdir), losses(expected)
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=1e-5, err_msg=name)
    found = read_json(workdir.eval_dir(6) / "metrics.json")
    np.testing.assert_allclose(found["AP"], metrics[""]["AP"], atol=1e-3)
    ids = [entry["image_id"] for entry in read_json(workdir.eval_dir(6) / "detections.json")]
    expected_ids = [entry["image_id"] for entry in read_json(expected.eval_dir(6) / "detections.json")]
    # Every image once: each has as many detections as it had in one process.
    assert ids == expected_ids


def test_two_processes_train_and_evaluate_as_one(tmp_path, config, alone):
    outputs = finish(start(config, tmp_path / "run"), timeout=300)
    assert all("Traceback" not in output for output in outputs), "\n".join(outputs)
    assert_same_run(Workdir(tmp_path / "run"), alone)


def test_where_one_dies_the_other_stops_and_one_process_goes_on(tmp_path, config, alone):
    processes = start(config, tmp_path / "run", dies_at=5)
    assert processes[1].wait(timeout=300) == -signal.SIGKILL
    processes[1].communicate()
    # Well below a minute after that; `communicate` raises otherwise.
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, None), output
    # JAX's coordinator tells which process is missing, and ends the others.
    assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\n1\n", output), output
    run(config, str(tmp_path / "run"), "train_and_eval")
    assert_same_run(Workdir(tmp_path / "run"), alone)
