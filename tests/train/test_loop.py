"""The training loop around a toy: batches, signals, NaN, evaluations and full disks."""

import errno
import logging
import os
import signal
import threading

import jax
import numpy as np
import pytest

from klbox_jax import files, main
from klbox_jax.errors import CheckpointError, Preempted
from klbox_jax.train import best_checkpoint, checkpoints, loop, run_evaluation, step_logger
from klbox_jax.train.checkpoints import find_fault, find_steps
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import MetricWriter, read_metrics
from tests.bits import assert_same_bits
from tests.programs import exit_code_of
from tests.train.acting_batches import acting_train_batches
from tests.train.toy import share_programs, toy_config, toy_job, use_toy


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    share_programs(monkeypatch)


class StopAfter(loop.Preemption):
    """Reports SIGTERM from its call `count` on; the loop calls it once a step."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def signal(self):
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else 0


def records_of(job, name="train/total_loss"):
    clocks = ("time", "train/seconds", "train/data_wait_share")
    found = [record for record in read_metrics(job.workdir.metrics) if name in record]
    return [{key: value for key, value in record.items() if key not in clocks} for record in found]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, accumulate):
    """At step 3, which with two batches to an update is in the middle of one."""
    fields = {"train.accumulate_steps": accumulate}
    straight, stopped = (toy_job(tmp_path, name, **fields) for name in ("straight", "stopped"))
    expected = loop.train(straight)
    with pytest.raises(Preempted, match=r"^SIGTERM: .*stopped is at step 3 of 6, which is saved") as caught:
        loop.train(stopped, preemption=StopAfter(3))
    assert caught.value.status == 143
    assert find_steps(stopped.workdir.checkpoints) == [3]
    assert_same_bits(loop.train(stopped), expected)
    assert records_of(stopped) == records_of(straight)


def test_the_first_step_finds_the_program_that_was_compiled_ahead(tmp_path, monkeypatch):
    """A new run and one that goes on trace the step once and compile it once, on a thread."""
    monkeypatch.undo()  # what is not shared is compiled
    threads, traced = [], []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration" and fun_name == "jit(step)":
            threads.append(threading.current_thread())
        elif event == "/jax/core/compile/jaxpr_trace_duration":
            traced.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for last in (2, 4):
            threads.clear()
            traced.clear()
            job = toy_job(tmp_path, **{"train.num_steps": last})
            loop.train(job)
            assert len(threads) == 1
            assert threads[0] is not threading.current_thread()
            assert traced.count("step") == job.train_step.num_traces == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_learning_rate_follows_the_updates(tmp_path):
    job = toy_job(tmp_path, **{"train.accumulate_steps": 2})
    loop.train(job)
    # 8 images to an update: half of the rate for 16. The warm-up of 2 updates goes from a share to all.
    config = job.config.optimizer
    peak, first = config.learning_rate / 2, config.warmup_factor
    expected = peak * np.repeat([first, (first + 1) / 2, 1], 2)
    records = records_of(job)
    np.testing.assert_allclose([r["train/learning_rate"] for r in records], expected, rtol=1e-5)
    # Every second step moves the parameters.
    assert [r["train/update_norm"] > 0 for r in records] == [False, True] * 3
    assert job.total_steps == 6


def test_epochs_are_whole_updates(tmp_path):
    # 5 steps an epoch, so 1.4 epochs are 7 steps: 2 updates of 4 are nearest.
    job = toy_job(tmp_path, **{"train.num_epochs": 1.4, "train.num_steps": 0, "train.accumulate_steps": 4})
    assert job.total_steps == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate_steps": 4}, r"accumulate_steps = 4 does not divide config\.train\.num_steps = 6"),
        ({"accumulate_steps": 0}, "accumulate_steps = 0 does not divide"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite = 'ignore' is unknown; choose stop or skip"),
        ({"profile_steps": (0, 3)}, r"profile_steps = \(0, 3\) is no range .* between 1 and 6"),
        ({"profile_steps": (3, 2)}, r"profile_steps = \(3, 2\) is no range"),
        ({"profile_steps": (3, 7)}, r"profile_steps = \(3, 7\) is no range"),
        ({"profile_steps": (3,)}, r"profile_steps = \(3,\) is no range"),
        ({"keep_best": "AP"}, r"keep_best = 'AP' needs evaluations .* set config\.train\.eval_every"),
        (
            {"keep_best": "AP", "eval_every": 2, "keep_best_checkpoints": 0},
            "keep_best_checkpoints = 0 must be at least 1",
        ),
        ({"keep_best": "loss", "eval_every": 2}, "keep_best = 'loss' is unknown; choose one of AP, AP50"),
        (
            {"early_stopping_patience": 2},
            r"early_stopping_patience = 2 needs .* set config\.train\.keep_best",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        toy_job(tmp_path, **{f"train.{name}": value for name, value in fields.items()})
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_needs_to_know_in_what(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint = 'best' needs config\.train\.keep_best"):
        toy_job(tmp_path, **{"evaluation.checkpoint": "best"})
    with pytest.raises(ValueError, match=r"checkpoint = 'first' is unknown; choose last or best"):
        toy_job(tmp_path, **{"evaluation.checkpoint": "first"})


def test_a_trace_of_some_steps(tmp_path):
    job = toy_job(tmp_path, **{"train.profile_steps": (2, 3)})
    loop.train(job)
    assert list(job.workdir.profile.rglob("*.xplane.pb"))
    # A run that resumes behind the range traces nothing; one that is stopped inside it still writes.
    other = toy_job(tmp_path, "other", **{"train.profile_steps": (2, 5)})
    with pytest.raises(Preempted):
        loop.train(other, preemption=StopAfter(3))
    assert len(list(other.workdir.profile.rglob("*.xplane.pb"))) == 1


def bad_image_of_step(job, step):
    """An image of a step that is in no earlier one."""
    ids = [set(job.train_plan.step(number).indices.tolist()) for number in range(step)]
    index = min(ids[-1] - set().union(*ids[:-1]))
    return job.train_source.records[index].image_id


def test_a_number_that_is_not_finite_stops_the_run(tmp_path):
    fields = {"train.save_every": 2}
    bad = bad_image_of_step(toy_job(tmp_path, **fields), 4)
    job = toy_job(tmp_path, nan_on=(bad,), **fields)
    with pytest.raises(FloatingPointError) as caught:
        loop.train(job)
    message = str(caught.value)
    assert message.startswith(
        "step 4: grad_norm, loss_box_reg, param_norm, total_loss, update_norm not finite"
    )
    assert str(bad) in message.partition("on images [")[2].partition("]")[0].split(", ")
    folder = job.workdir.checkpoints
    assert f"the last sound checkpoint, of step 2 in {folder}, is as it was" in message
    assert "config.train.on_nonfinite = 'skip'" in message
    assert find_steps(folder) == [2]
    assert find_fault(folder / "2") is None
    early = toy_job(tmp_path, "early", nan_on=(bad,))
    with pytest.raises(FloatingPointError, match="checkpoints has no sound checkpoint yet"):
        loop.train(early)


def test_skipped_steps_are_counted_over_an_interruption(tmp_path, caplog):
    fields = {"train.on_nonfinite": "skip", "train.log_every": 100}
    plan = toy_job(tmp_path, **fields)
    bad = (bad_image_of_step(plan, 2), bad_image_of_step(plan, 4))
    job = toy_job(tmp_path, nan_on=bad, **fields)
    with caplog.at_level(logging.WARNING, "absl"):
        with pytest.raises(Preempted):
            loop.train(job, preemption=StopAfter(3))
        state = loop.train(job)
    assert int(state.step) == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    counts = {r["step"]: r["train/skipped_steps"] for r in records_of(job, "train/skipped_steps")}
    # Which of the other steps show these images again is the plan's affair.
    skipped = [
        step
        for step in range(1, 7)
        if {job.train_source.records[i].image_id for i in job.train_plan.step(step - 1).indices} & set(bad)
    ]
    assert {2, 4} <= set(skipped)
    assert counts == {s: sum(number <= s for number in skipped) for s in sorted({3, 6, *skipped})}
    warnings = [r.getMessage() for r in caplog.records if "the step changes nothing" in r.getMessage()]
    assert [warning.split(":")[0] for warning in warnings] == [f"step {step}" for step in skipped]
    assert str(bad[0]) in warnings[0].partition("on images [")[2].partition("]")[0].split(", ")
    assert find_fault(job.workdir.checkpoints / "6") is None


def test_a_run_that_only_skips_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(step_logger, "MOST_SKIPPED_IN_A_ROW", 3)
    job = toy_job(tmp_path, nan_on=tuple(range(1, 19)), **{"train.on_nonfinite": "skip"})
    with pytest.raises(FloatingPointError, match=r"^step 3: .*like all of the 3 steps up to it"):
        loop.train(job)


def evaluator_of(job, values):
    """Records the next of the values as the AP of each evaluation."""
    values, seen = iter(values), []

    def evaluate(params, step):
        with MetricWriter(job.workdir, tensorboard=False) as writer:
            writer.write(step, {"val/AP": next(values)})
        seen.append(step)

    return evaluate, seen


BEST = {"train.keep_best": "AP", "train.eval_every": 1, "train.keep_checkpoints": 1}


def test_the_best_checkpoint_stays(tmp_path):
    job = toy_job(tmp_path, **BEST)
    evaluate, seen = evaluator_of(job, [10.0, 30.0, 20.0, 30.0, 5.0])
    # Stopped behind step 4, before its evaluation, with which the next start begins.
    with pytest.raises(Preempted):
        loop.train(job, evaluate=evaluate, preemption=StopAfter(4))
    assert seen == [1, 2, 3]
    assert find_steps(job.workdir.checkpoints) == [2, 4]
    loop.train(job, evaluate=evaluate)
    assert seen == [1, 2, 3, 4, 5]
    # Of equals the first.
    assert find_steps(job.workdir.checkpoints) == [2, 6]
    assert find_fault(job.workdir.checkpoints / "2") is None
    assert best_checkpoint.best_checkpoint(job.workdir, "AP") == 2
    assert best_checkpoint.scores(job.workdir, "AP") == {1: 10.0, 2: 30.0, 3: 20.0, 4: 30.0, 5: 5.0}


def test_the_two_best_checkpoints_stay(tmp_path):
    job = toy_job(tmp_path, **BEST | {"train.keep_best_checkpoints": 2})
    evaluate, _ = evaluator_of(job, [20.0, 10.0, 30.0, 20.0, 5.0])
    loop.train(job, evaluate=evaluate)
    # Of equals the first; and the last of all.
    assert find_steps(job.workdir.checkpoints) == [1, 3, 6]
    assert best_checkpoint.evaluation_history(job.workdir, "AP", eval_every=1, count=2).best_steps == (3, 1)
    assert best_checkpoint.best_checkpoint(job.workdir, "AP") == 3


def test_the_best_checkpoint_stays_where_a_run_resumes_between_evaluations(tmp_path):
    job = toy_job(tmp_path, **BEST | {"train.eval_every": 2})
    evaluate, seen = evaluator_of(job, [30.0, 20.0])
    with pytest.raises(Preempted):
        loop.train(job, evaluate=evaluate, preemption=StopAfter(3))
    assert find_steps(job.workdir.checkpoints) == [2, 3]
    loop.train(job, evaluate=evaluate)
    assert seen == [2, 4]
    assert find_steps(job.workdir.checkpoints) == [2, 6]


def test_a_run_without_better_evaluations_ends_early(tmp_path, caplog):
    job = toy_job(tmp_path, **BEST | {"train.early_stopping_patience": 2})
    evaluate, seen = evaluator_of(job, [10.0, 30.0, 30.0, 20.0])
    with caplog.at_level(logging.INFO, "absl"):
        state = loop.train(job, evaluate=evaluate)
        assert int(state.step) == 4
        assert "run is trained: it ends early at step 4 of 6, after 2 evaluations without" in caplog.text
        # A resume trains on no further.
        again = loop.train(job, evaluate=evaluate)
    assert_same_bits(again, state)
    assert seen == [1, 2, 3, 4]
    assert find_steps(job.workdir.checkpoints) == [2, 4]


def test_the_last_step_of_a_run_that_ends_early_is_evaluated_once(tmp_path, monkeypatch):
    use_toy(monkeypatch)
    seen = []

    def nothing(self, params, source, plan, *, step):
        seen.append(step)
        return {"": []}

    monkeypatch.setattr(run_evaluation.Evaluation, "detections", nothing)
    config = toy_config(tmp_path, **BEST | {"train.early_stopping_patience": 2})
    metrics = main.run(config, str(tmp_path / "run"), "train_and_eval")
    # Nothing is found, so that no evaluation is better than the first.
    assert seen == [1, 2, 3]
    assert metrics[""]["AP"] == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "val/AP" in record] == seen


def test_a_metric_that_no_evaluation_has_is_refused(tmp_path):
    job = toy_job(tmp_path, **BEST | {"train.keep_best": "mask_AP"})
    evaluate, _ = evaluator_of(job, [10.0])
    with pytest.raises(
        ValueError, match="keep_best = 'mask_AP' is not among the metrics of the evaluation of step 1"
    ):
        loop.train(job, evaluate=evaluate)


def test_eval_reads_the_best_checkpoint_if_the_config_says_so(tmp_path, monkeypatch):
    job = toy_job(tmp_path, **BEST)
    loop.train(job, evaluate=evaluator_of(job, [10.0, 30.0, 20.0, 5.0, 5.0])[0])
    seen = []

    class Recorder:
        def __init__(self, *_, **__):
            pass

        def __call__(self, params, step):
            seen.append(step)
            return {}

    use_toy(monkeypatch)
    monkeypatch.setattr(run_evaluation, "Evaluation", Recorder)
    for checkpoint in ("best", "last"):
        config = toy_config(tmp_path, **BEST | {"evaluation.checkpoint": checkpoint})
        main.run(config, str(job.workdir.path), "eval")
    assert seen == [2, 6]
    job.workdir.metrics.unlink()
    with pytest.raises(CheckpointError, match=r"has no checkpoint with val/AP in .*metrics\.jsonl; train"):
        best_checkpoint.best_checkpoint(job.workdir, "AP")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_program_that_a_signal_stops_says_so(tmp_path, monkeypatch, capsys, number, status):
    use_toy(monkeypatch)
    before = signal.getsignal(number)
    batches = acting_train_batches(2, lambda: signal.raise_signal(number))
    monkeypatch.setattr(loop, "train_batches", batches)
    assert exit_code_of(toy_config(tmp_path), tmp_path / "run", "train") == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"stopped by {signal.Signals(number).name}: {tmp_path / 'run'} is at step 2 of 6, which is saved; the same "
        "command goes on from there"
    )
    assert find_steps(tmp_path / "run" / "checkpoints") == [2]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("checkpoint", errno.ENOSPC),
        ("checkpoint", errno.EROFS),
        ("digests", errno.ENOSPC),
        ("metrics", errno.ENOSPC),
        ("metrics", errno.EACCES),
    ],
)
def test_what_cannot_be_written_is_reported_in_one_line(tmp_path, monkeypatch, what, code):
    """From the second save on, so that there is a checkpoint to lose."""
    use_toy(monkeypatch)
    run = Workdir(tmp_path / "run")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    def arm():
        if what == "checkpoint":
            monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
        elif what == "metrics":
            monkeypatch.setattr(MetricWriter, "write", with_broken_file(MetricWriter.write))
        else:
            monkeypatch.setattr(files.os, "replace", fail)

    def with_broken_file(write):
        def broken(self, *arguments):
            monkeypatch.setattr(self, "_file", Broken(self._file))
            return write(self, *arguments)

        return broken

    class Broken:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            fail()

        def close(self):
            self.file.close()
            fail()

    original = checkpoints.Checkpoints.save

    def save(self, state):
        original(self, state)
        if int(state.step) == 2:
            arm()

    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    (first,) = exit_code_of(toy_config(tmp_path, **{"train.save_every": 2}), run.path, "train").splitlines()
    place = {"checkpoint": run.checkpoints / "4", "digests": run.checkpoints / "4", "metrics": run.metrics}
    assert first.startswith(f"error: {place[what]} cannot be ")
    assert os.strerror(code) in first
    assert "free space" in first
    assert "start again: the same command goes on from the last checkpoint" in first
    # Nothing is left of the failed save, and nothing is missing of the one before.
    assert find_steps(run.checkpoints) == [2]
    assert find_fault(run.checkpoints / "2") is None
    assert not list(run.checkpoints.glob("*tmp*"))
