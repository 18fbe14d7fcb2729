"""The training loop. An interrupted run resumes where it stopped."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from klbox_jax.compilation import give_back_freed_memory
from klbox_jax.data.loader import train_batches
from klbox_jax.data.plan import Shard
from klbox_jax.distributed import put_batch
from klbox_jax.errors import Preempted
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.init_or_restore import init_or_restore
from klbox_jax.train.job import Job
from klbox_jax.train.optimizer import peak_learning_rate
from klbox_jax.train.periodic_evaluation import PeriodicEvaluation
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.profiling import Profile
from klbox_jax.train.state import TrainState
from klbox_jax.train.step_logger import Clock, StepLogger
from klbox_jax.train.writer import MetricWriter, Progress, last_value


def train(
    job: Job,
    *,
    evaluate: Callable[[Any, int], Any] | None = None,
    claim: Callable[[], None] | None = None,
    preemption: Preemption | None = None,
) -> TrainState:
    """Trains to the last step of the config and returns the final state.

    One step is one batch. The parameters are updated every `config.train.accumulate_steps` steps. A run starts from
    the newest sound checkpoint, else from the weights of `config.model.init_weights`, else from random numbers.

    Args:
        job: the run.
        evaluate: called with parameters and step every `config.train.eval_every` steps except the last, after a
            checkpoint of that step. The metrics that it writes to metrics.jsonl decide which checkpoint is the best
            and whether the training ends early.
        claim: called once, when nothing of the start can fail any more and before the first step; writes the config
            to the folder.
        preemption: source of stop signals; None ignores signals.

    Raises:
        Preempted: a signal stopped the training; the state of the last step is saved.
        FloatingPointError: a metric is not finite; the last checkpoint is unchanged.
        DataError, CheckpointError, WeightFileError, WorkdirError: a file cannot be used; the message names it.
    """
    config, train_step = job.config.train, job.train_step
    preemption = preemption or Preemption()
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(job.workdir.checkpoints, max_to_keep=config.keep_checkpoints)
        )
        state = init_or_restore(job, checkpoints)
        if claim is not None:
            claim()
        give_back_freed_memory()
        start = int(state.step)
        if start >= job.total_steps:
            logging.info("%s is trained to its last step, %d", job.workdir.path, start)
            return state
        _log_start(job, start)
        writer = stack.enter_context(MetricWriter(job.workdir, resume_step=start))
        clock = Clock(seconds=training_seconds(job))
        evaluation = PeriodicEvaluation(job, checkpoints, evaluate=evaluate, clock=clock)
        # A run that was stopped during an evaluation starts with it.
        if evaluation.is_due(start) and evaluation(state.params, start):
            return state
        progress = stack.enter_context(
            Progress(job.total_steps, initial=start, description=f"train {job.workdir.path.name}")
        )
        batches = stack.enter_context(contextlib.closing(_batches(job, start)))
        profile = stack.enter_context(Profile(config.profile_steps, job.workdir.profile))
        metrics = StepLogger(job, writer=writer, progress=progress, clock=clock)

        for step in range(start + 1, job.total_steps + 1):
            profile.before(step)
            with clock.waiting():
                batch = next(batches)
            # A step that compiles a program does not count in the rate that the remaining time is computed from.
            started, traces = time.monotonic(), train_step.num_traces
            state, scalars = train_step(state, put_batch(batch, job.mesh))
            if step == start + 1 or train_step.num_traces > traces:
                progress.leave_out(time.monotonic() - started)
            profile.after(step, scalars)
            metrics.add(step, scalars)
            is_last = step == job.total_steps
            stopped_by = 0 if is_last else preemption.signal()
            if is_last or stopped_by or evaluation.is_due(step) or step % config.save_every == 0:
                # Metrics first: a state with a NaN never replaces a sound checkpoint.
                metrics.flush()
                checkpoints.save(state)
            if stopped_by:
                raise Preempted(stopped_by, _saved_at(job, step))
            if evaluation.is_due(step) and evaluation(state.params, step):
                break
        logging.info("%d traces of the training step", train_step.num_traces)
        return state


def _saved_at(job: Job, step: int) -> str:
    where = f"{job.workdir.path} is at step {step} of {job.total_steps}"
    return f"{where}, which is saved; the same command goes on from there"


def training_seconds(job: Job) -> float:
    """Returns the seconds of training up to the last record, over all starts of the run."""
    return float(last_value(job.workdir, "train/seconds"))


def _batches(job: Job, start: int):
    return train_batches(
        job.train_source,
        job.train_plan,
        job.preprocessing,
        steps=range(start, job.total_steps),
        num_threads=job.config.data.num_threads,
        shard=Shard(jax.process_index(), jax.process_count()),
    )


def _log_start(job: Job, start: int) -> None:
    config = job.config.train
    images = config.batch_size * config.accumulate_steps
    logging.info(
        "training %s on %s from step %d to %d, batch %d on %d devices, peak learning rate %.2e",
        job.workdir.path.name,
        job.train_source.name,
        start,
        job.total_steps,
        config.batch_size,
        job.mesh.size,
        peak_learning_rate(job.config.optimizer.learning_rate, images=images),
    )
