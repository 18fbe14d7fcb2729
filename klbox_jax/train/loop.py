"""The training loop: batches in, checkpoints and metrics out; an interrupted run goes on where it was."""

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from klbox_jax.data.loader import train_batches
from klbox_jax.data.plan import Shard
from klbox_jax.distributed import is_writer, put_batch
from klbox_jax.errors import Preempted
from klbox_jax.train import best_checkpoint
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.init_or_restore import init_or_restore
from klbox_jax.train.job import Job
from klbox_jax.train.optimizer import build_optimizer, peak_learning_rate
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.profiling import Profile
from klbox_jax.train.reporter import Clock, Reporter
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_train_step
from klbox_jax.train.writer import MetricWriter, Progress, read_metrics


def train(
    job: Job,
    *,
    evaluate: Callable[[Any, int], Any] | None = None,
    preemption: Preemption | None = None,
) -> TrainState:
    """Trains to the last step of the config and returns the final state.

    A step is a batch. The parameters move every `config.train.accumulate_steps` steps, and the learning rate
    follows these updates: warm-up and decay count them, and its linear scaling the images of an update.

    Starts from, in this order: the newest sound checkpoint of the folder; the weights that
    `config.model.init_weights` names, of a whole detector or of a backbone alone; random numbers.

    Args:
        job: the run.
        evaluate: called with parameters and step every `config.train.eval_every` steps but the last, behind a
            checkpoint of that step. What it records in metrics.jsonl decides which checkpoint is kept as the
            best, and whether the training ends early.
        preemption: where the loop hears that it is to stop; without one it is told by nobody.

    Raises:
        Preempted: it was told to stop, and has a checkpoint of the step it stopped at.
        FloatingPointError: a number is not finite; the last checkpoint is left as it is.
        DataError, CheckpointError, WeightFileError, WorkdirError: naming the file.
    """
    config = job.config.train
    optimizer, schedule = build_optimizer(
        job.config.optimizer,
        batch_size=config.batch_size,
        accumulate_steps=config.accumulate_steps,
        total_steps=job.total_steps,
    )
    step_fn = compile_train_step(
        job.mesh,
        model=job.model,
        optimizer=optimizer,
        schedule=schedule,
        seed=job.config.seed,
        frozen=job.config.optimizer.frozen,
        skip_nonfinite=config.on_nonfinite == "skip",
    )
    preemption = preemption or Preemption()
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(job.workdir.checkpoints, max_to_keep=config.keep_checkpoints)
        )
        state, compiling = init_or_restore(job, optimizer, checkpoints, step_fn)
        give_back_freed_memory()
        start = int(state.step)
        if start >= job.total_steps:
            logging.info("%s is trained to its last step, %d", job.workdir.path, start)
            return state
        logging.info(
            "training %s on %s from step %d to %d, batch %d on %d devices, peak learning rate %.2e",
            job.workdir.path.name,
            job.train_source.name,
            start,
            job.total_steps,
            config.batch_size,
            job.mesh.size,
            peak_learning_rate(
                job.config.optimizer.learning_rate, images=config.batch_size * config.accumulate_steps
            ),
        )
        writer = stack.enter_context(MetricWriter(job.workdir, resume_step=start))
        clock = Clock(seconds=training_seconds(job))

        def periodic_evaluation(step: int) -> bool:
            """Evaluates unless that is done; returns whether the training ends here."""
            if not evaluate or not config.eval_every or step == 0 or step % config.eval_every:
                return False
            if not best_checkpoint.is_evaluated(job.workdir, step):
                with clock.paused():
                    evaluate(state.params, step)
            return bool(config.keep_best) and _keep_best(job, checkpoints, step)

        if evaluate and config.keep_best:
            checkpoints.protect(*_standing(job).best_steps)
        # A run that was stopped during an evaluation begins with it.
        if periodic_evaluation(start):
            return state
        progress = stack.enter_context(
            Progress(job.total_steps, initial=start, description=f"train {job.workdir.path.name}")
        )
        batches = stack.enter_context(
            contextlib.closing(
                train_batches(
                    job.train_source,
                    job.train_plan,
                    job.preprocessing,
                    steps=range(start, job.total_steps),
                    num_threads=job.config.data.num_threads,
                    shard=Shard(jax.process_index(), jax.process_count()),
                )
            )
        )
        profile = stack.enter_context(Profile(config.profile_steps, job.workdir.profile))
        report = Reporter(
            job, writer=writer, progress=progress, clock=clock, skipped=int(_last(job, "train/skipped_steps"))
        )
        pending, traces = None, 0
        for step in range(start + 1, job.total_steps + 1):
            profile.before(step)
            with clock.waiting():
                batch = next(batches)
            if compiling:
                compiling.result()
                compiling = None
            state, scalars = step_fn(state, put_batch(batch, job.mesh))
            profile.after(step, scalars)
            if step_fn._cache_size() > traces:
                traces = step_fn._cache_size()
                give_back_freed_memory()
            # The numbers of the step before are read while this one runs: the device never waits for the host.
            if pending is not None:
                report(*pending)
            pending = (step, scalars)
            is_last = step == job.total_steps
            stopped_by = 0 if is_last else preemption.signal()
            evaluates = bool(evaluate and config.eval_every) and step % config.eval_every == 0 and not is_last
            if step % config.save_every == 0 or is_last or stopped_by or evaluates:
                # What is saved has been looked at: a state with a NaN never replaces a sound one.
                report(*pending, log=True)
                pending = None
                checkpoints.save(state)
            if stopped_by:
                raise Preempted(
                    stopped_by,
                    f"{job.workdir.path} is at step {step} of {job.total_steps}, which is saved; the same command "
                    "goes on from there",
                )
            if evaluates and periodic_evaluation(step):
                break
        logging.info("%d traces of the training step", step_fn._cache_size())
        return state


def _keep_best(job: Job, checkpoints: Checkpoints, step: int) -> bool:
    """Keeps the best checkpoint so far; returns whether no better one is waited for any longer."""
    config = job.config.train
    if is_writer() and step not in best_checkpoint.scores(job.workdir, config.keep_best):
        raise ValueError(
            f"config.train.keep_best = {config.keep_best!r} is not among the numbers of the evaluation of step "
            f"{step}: {job.workdir.metrics} has no val/{config.keep_best}"
        )
    standing = _standing(job)
    checkpoints.protect(*standing.best_steps)
    if not config.early_stopping_patience or standing.since_best < config.early_stopping_patience:
        return False
    logging.info(
        "%s is trained: it ends early at step %d of %d, after %d evaluations without a better %s; the best "
        "checkpoint is that of step %s",
        job.workdir.path,
        step,
        job.total_steps,
        standing.since_best,
        config.keep_best,
        standing.best_steps[0],
    )
    return True


def _standing(job: Job) -> best_checkpoint.Standing:
    config = job.config.train
    count = config.keep_best_checkpoints
    return best_checkpoint.standing(job.workdir, config.keep_best, eval_every=config.eval_every, count=count)


def training_seconds(job: Job) -> float:
    """Returns the seconds that training has taken up to the last record, over all its interruptions."""
    return float(_last(job, "train/seconds"))


def _last(job: Job, name: str) -> float | int:
    """The last number that was recorded under a name; 0 where there is none."""
    if not job.workdir.metrics.exists():
        return 0
    return next((r[name] for r in reversed(read_metrics(job.workdir.metrics)) if name in r), 0)


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, where the C library is glibc; nothing happens elsewhere.

    Compiling a large training step frees hundreds of megabytes in pieces, which glibc keeps: the arrays of the step
    would come on top of them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
