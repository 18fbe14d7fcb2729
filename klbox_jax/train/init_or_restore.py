"""What a run starts from: a checkpoint or a new state, and the program of its first step.

Compilers run outside the interpreter's lock. So the step is compiled on a thread while the state is made or read.
"""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from klbox_jax.data.loader import blank_batch
from klbox_jax.data.plan import Shard
from klbox_jax.distributed import is_writer, put_batch, replicated
from klbox_jax.files import write_json
from klbox_jax.structures import Batch, GroundTruth
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.job import Job
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_and_create_state, lower_create_state
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.provenance import check_provenance
from klbox_jax.weights.weight_file import weights_digest


def init_or_restore(
    job: Job, optimizer, checkpoints: Checkpoints, step_fn
) -> tuple[TrainState, Future | None]:
    """Returns the state that a run starts from, and the compilation of its first step, under way on a thread.

    Args:
        job: the run.
        optimizer: of `build_optimizer`.
        checkpoints: the newest sound one is the state. Without any the state is new, filled from
            `config.model.init_weights` where that is set.
        step_fn: of `compile_train_step`. Once the compilation is done it has its program for the canvas of the step
            behind the newest checkpoint; for other canvases it is compiled when they come.

    Returns:
        The state, on all devices, and the compilation, or None where no step is left to do.

    Raises:
        CheckpointError, WeightFileError: naming the file.
    """
    on_all_devices, start = replicated(job.mesh), checkpoints.latest_step()
    init = lower_create_state(job.model, optimizer, batch=dummy_batch(job.preprocessing.canvases[0]))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_all_devices), init.out_info
    )
    making = compiling = None
    pool = ThreadPoolExecutor(2)
    if start is None:
        making = pool.submit(compile_and_create_state, init, seed=job.config.seed)
    if (start or 0) < job.total_steps:
        step = job.train_plan.step(start or 0)
        batch = blank_batch(
            job.train_source,
            step,
            job.preprocessing,
            shard=Shard(jax.process_index(), jax.process_count()),
        )
        compiling = pool.submit(step_fn.lower(abstract, put_batch(batch, job.mesh)).compile)
    # What is wrong with a checkpoint or with weights is told at once. The process then ends with its threads.
    pool.shutdown(wait=False)
    if making is None:
        return checkpoints.restore(abstract), compiling
    state = making.result()
    if job.config.model.init_weights:
        state = state.replace(params=_initial_params(job, state.params))
    return jax.device_put(state, on_all_devices), compiling


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
        digest = weights_digest(config.init_weights)
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
        boxes=np.array([[[0.0, 0.0, 1.0, 1.0]]], np.float32),
        classes=np.zeros((1, 1), np.int32),
        is_crowd=np.zeros((1, 1), bool),
        valid=np.ones((1, 1), bool),
        box_stds=np.ones((1, 1, 4), np.float32),
        masks=np.zeros((1, 1, 1, 1), np.uint8),
    )
    batch = Batch(
        images=np.zeros((1, *canvas, 3), np.uint8),
        image_size=np.array([canvas], np.int32),
        scale=np.ones((1, 2), np.float32),
        image_id=np.zeros(1, np.int32),
        valid=np.ones(1, bool),
        gt=gt,
    )
    # NumPy's, for `jnp.zeros` and the like would each compile a program.
    return jax.tree.map(jnp.asarray, batch)
