"""Two processes of two devices each on one machine, compared with one process of four."""

import re
import signal

import numpy as np
import pytest

from klbox_jax.files import read_json
from klbox_jax.main import run
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics
from tests.programs import finish, free_address, start_python
from tests.thin import scenes_config

pytestmark = pytest.mark.four_devices

PROGRAM = """
import os, signal, sys
from absl import flags
from klbox_jax import distributed
from klbox_jax.cli import report_user_errors
from klbox_jax.main import run
from klbox_jax.train import loop
from tests.thin import scenes_config
from tests.train.acting_batches import acting_train_batches

flags.FLAGS.mark_as_parsed()
root, workdir, address, rank, dies_at = sys.argv[1:]
distributed.initialize(address, 2, int(rank))
if rank == "1":
    loop.train_batches = acting_train_batches(int(dies_at), lambda: os.kill(os.getpid(), signal.SIGKILL))
config = scenes_config("loss=kl", **{"data.root": root})
report_user_errors(lambda argv: run(config, workdir, "train_and_eval"))(["program"])
"""


def start(config, workdir, *, dies_at=0):
    """Starts both processes; the second kills itself when it asks for batch `dies_at`, 0 for never."""
    address = free_address()
    return [
        start_python("-c", PROGRAM, config.data.root, workdir, address, rank, dies_at, devices=2)
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def config(module_path):
    return scenes_config("loss=kl", **{"data.root": str(module_path / "scenes")})


@pytest.fixture(scope="module")
def alone(module_path, config):
    """One process of four devices."""
    folder = module_path / "alone"
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
    for output, errors in finish(*start(config, tmp_path / "run")):
        assert "Traceback" not in output + errors
    assert_same_run(Workdir(tmp_path / "run"), alone)


def test_where_one_dies_the_other_stops_and_one_process_goes_on(tmp_path, config, alone):
    processes = start(config, tmp_path / "run", dies_at=5)
    assert processes[1].wait(timeout=300) == -signal.SIGKILL
    processes[1].communicate()
    # Well below a minute after that; `communicate` raises otherwise.
    _, errors = processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, None), errors
    # JAX's coordinator reports the missing process and ends the others.
    assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\n1\n", errors), errors
    run(config, str(tmp_path / "run"), "train_and_eval")
    assert_same_run(Workdir(tmp_path / "run"), alone)
