from klbox_jax.evaluation import eval_step as eval_step_module
from klbox_jax.main import run
from klbox_jax.train.job import Job
from klbox_jax.train.step import TrainStep
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics
from tests.coco_folder import write_folder
from tests.thin import coco_config


def counted(traces, function):
    """`function` that records the canvas of its batch, the last argument; under `jax.jit` once for each trace."""

    def wrapped(*arguments, **static):
        traces.append(arguments[-1].images.shape)
        return function(*arguments, **static)

    return wrapped


def test_one_trace_for_each_canvas_and_phase(tmp_path, monkeypatch):
    # Both compiled steps are these functions and nothing else.
    train_traces, eval_traces = [], []
    monkeypatch.setattr(TrainStep, "__call__", counted(train_traces, TrainStep.__call__))
    counted_eval_step = counted(eval_traces, eval_step_module.eval_step)
    monkeypatch.setattr(eval_step_module, "eval_step", counted_eval_step)
    root = write_folder(tmp_path / "pond", images_per_shape=4)
    config = coco_config(
        root, "loss=kl", **{"train.num_epochs": 2.0, "train.eval_every": 3, "train.log_every": 1}
    )
    job = Job(config, Workdir(tmp_path / "run"), trains=True)
    assert job.total_steps == 6
    assert sorted(job.train_plan.step(number).canvas for number in range(6)) == [0, 0, 1, 1, 2, 2]
    assert sorted(job.eval_plan.step(number).canvas for number in range(3)) == [0, 1, 2]

    run(config, str(tmp_path / "run"), "train_and_eval")

    canvases = {(4, 64, 96, 3), (4, 96, 64, 3), (4, 80, 80, 3)}
    # Two epochs of training and an evaluation after each of them.
    assert len(train_traces) == 3
    assert set(train_traces) == canvases
    assert len(eval_traces) == 3
    assert set(eval_traces) == canvases
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "train/total_loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "val/AP" in record] == [3, 6]
