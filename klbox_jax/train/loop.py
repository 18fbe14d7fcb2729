"""The training loop: batches in, checkpoints and metrics out; an interrupted run goes on where it was."""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from klbox_jax.data.loader import train_batches
from klbox_jax.distributed import put_batch, replicated
from klbox_jax.structures import Batch, GroundTruth
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.job import Job
from klbox_jax.train.optimizer import learning_rate_schedule, make_optimizer
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_train_step, create_state
from klbox_jax.train.workdir import is_writer, write_json
from klbox_jax.train.writer import MetricWriter, Progress, read_metrics
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.provenance import check_provenance


def train(job: Job, *, evaluate: Callable[[Any, int], None] | None = None) -> TrainState:
    """Trains to the last step of the config and returns the final state.

    Starts from, in this order: the newest sound checkpoint of the folder; the weights that
    `config.model.init_weights` names, of a whole detector or of a backbone alone; random numbers.

    Args:
        job: the run.
        evaluate: called with parameters and step every `config.train.eval_every` steps but the last.

    Raises:
        FloatingPointError: a loss is not finite; the last checkpoint is left as it is.
        DataError, CheckpointError, WeightFileError: naming the file.
    """
    config = job.config.train
    schedule = learning_rate_schedule(
        learning_rate=job.config.optimizer.learning_rate,
        global_batch=config.batch_size,
        total_steps=job.total_steps,
        warmup_steps=job.config.optimizer.warmup_steps,
        warmup_factor=job.config.optimizer.warmup_factor,
        decay_at=job.config.optimizer.decay_at,
        decay_factor=job.config.optimizer.decay_factor,
    )
    optimizer = make_optimizer(
        name=job.config.optimizer.name,
        schedule=schedule,
        weight_decay=job.config.optimizer.weight_decay,
        momentum=job.config.optimizer.momentum,
        clip_norm=job.config.optimizer.clip_norm,
        frozen=job.config.optimizer.frozen,
    )
    step_fn = compile_train_step(
        job.mesh,
        model=job.model,
        optimizer=optimizer,
        schedule=schedule,
        seed=job.config.seed,
        frozen=job.config.optimizer.frozen,
    )
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(job.workdir.checkpoints, max_to_keep=config.keep_checkpoints)
        )
        state = _first_state(job, optimizer, checkpoints)
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
            float(schedule(job.config.optimizer.warmup_steps)),
        )
        writer = stack.enter_context(MetricWriter(job.workdir, resume_step=start))
        progress = stack.enter_context(
            Progress(job.total_steps, initial=start, description=f"train {job.workdir.path.name}")
        )
        batches = stack.enter_context(
            contextlib.closing(
                train_batches(
                    job.train_source,
                    job.train_plan,
                    job.preprocessing,
                    start_step=start,
                    num_steps=job.total_steps - start,
                    num_threads=job.config.data.num_threads,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                )
            )
        )
        clock = _Clock(seconds=training_seconds(job))
        pending = None
        for step in range(start + 1, job.total_steps + 1):
            with clock.waiting():
                batch = next(batches)
            state, scalars = step_fn(state, put_batch(batch, job.mesh))
            # The numbers of the step before are read while this one runs: the device never waits for the host.
            if pending is not None:
                _report(*pending, clock=clock, job=job, writer=writer, progress=progress)
            pending = (step, scalars)
            if step % config.save_every == 0 or step == job.total_steps:
                # What is saved has been looked at: a state with a NaN never replaces a sound one.
                _report(*pending, clock=clock, job=job, writer=writer, progress=progress, log=True)
                pending = None
                checkpoints.save(state)
            if evaluate and config.eval_every and step % config.eval_every == 0 and step < job.total_steps:
                with clock.paused():
                    evaluate(state.params, step)
        logging.info("%d traces of the training step", step_fn._cache_size())
        return state


def training_seconds(job: Job) -> float:
    """Returns the seconds that training has taken up to the last record, over all its interruptions."""
    if not job.workdir.metrics.exists():
        return 0.0
    records = [record for record in read_metrics(job.workdir.metrics) if "train/seconds" in record]
    return records[-1]["train/seconds"] if records else 0.0


def _first_state(job: Job, optimizer, checkpoints: Checkpoints) -> TrainState:
    """The newest sound checkpoint, else a new state."""
    shapes = dummy_batch(job.preprocessing.canvases[0])
    sharding = replicated(job.mesh)
    if checkpoints.latest_step() is not None:
        abstract = jax.eval_shape(
            lambda: create_state(job.model, optimizer, batch=shapes, seed=job.config.seed)
        )
        return checkpoints.restore(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
        )
    state = create_state(job.model, optimizer, batch=shapes, seed=job.config.seed)
    if job.config.model.init_weights:
        state = state.replace(params=_initial_params(job, state.params))
    return jax.device_put(state, sharding)


def _initial_params(job: Job, params: dict[str, Any]) -> dict[str, Any]:
    """Fills parameters from `config.model.init_weights`, and tells in the log and in weights.json with what."""
    config = job.config.model
    params, report = load_weights(
        params,
        config.init_weights,
        box_coder=job.model.roi_heads.box_coder,
        rpn_box_coder=job.model.rpn.box_coder,
        pooled_side=config.box_pooler.resolution,
        init_partial=config.init_partial,
    )
    check_provenance(config, report.provenance)
    logging.info("%s: %s", config.init_weights, report)
    if is_writer():
        with open(config.init_weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        provenance = {
            # A coder by its name and weights.
            name: repr(value) if dataclasses.is_dataclass(value) else value
            for name, value in vars(report.provenance).items()
        }
        write_json(
            job.workdir.weights,
            {
                "path": config.init_weights,
                "sha256": digest,
                "provenance": provenance,
                "loaded": report.loaded,
                "reinitialized": report.reinitialized,
                "unused": report.unused,
            },
        )
    return params


def dummy_batch(canvas: tuple[int, int]) -> Batch:
    """Returns a batch of one black image, which gives the parameters their shapes and nothing else."""
    gt = GroundTruth(
        boxes=jnp.array([[[0.0, 0.0, 1.0, 1.0]]]),
        classes=jnp.zeros((1, 1), jnp.int32),
        is_crowd=jnp.zeros((1, 1), bool),
        valid=jnp.ones((1, 1), bool),
        box_stds=jnp.ones((1, 1, 4)),
        masks=jnp.zeros((1, 1, 1, 1), jnp.uint8),
    )
    return Batch(
        images=jnp.zeros((1, *canvas, 3), jnp.uint8),
        image_size=jnp.array([canvas], jnp.int32),
        scale=jnp.ones((1, 2)),
        image_id=jnp.zeros(1, jnp.int32),
        valid=jnp.ones(1, bool),
        gt=gt,
    )


class _Clock:
    """Seconds of training, and how many of them were spent waiting for data."""

    def __init__(self, *, seconds: float):
        self._before = seconds
        self._start = time.perf_counter()
        self._wait = 0.0

    @contextlib.contextmanager
    def waiting(self):
        started = time.perf_counter()
        yield
        self._wait += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self):
        started = time.perf_counter()
        yield
        self._start += time.perf_counter() - started

    def numbers(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        return {"train/seconds": self._before + elapsed, "train/data_wait_share": self._wait / elapsed}


def _report(
    step: int, scalars: dict[str, Any], *, clock: _Clock, job: Job, writer, progress, log: bool = False
):
    """Reads a step's numbers, stops on one that is not finite, and writes them where it is their turn."""
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    numbers = {f"train/{name}": value for name, value in values.items()} | clock.numbers()
    if broken:
        writer.write(step, numbers)
        plan = job.train_plan.step(step - 1)
        ids = [job.train_source.records[index].image_id for index in np.asarray(plan.indices)]
        raise FloatingPointError(
            f"step {step}: {', '.join(broken)} not finite, on images {ids}; lower config.optimizer.learning_rate "
            f"or config.optimizer.clip_norm, and start again to go on from the last checkpoint in "
            f"{job.workdir.checkpoints}"
        )
    progress.update(step, loss=values["total_loss"])
    if log or step % job.config.train.log_every == 0:
        writer.write(step, numbers)
