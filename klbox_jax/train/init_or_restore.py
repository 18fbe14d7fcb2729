"""The first state of a run, from a checkpoint or new, while its training step is compiled.

Compilers run without Python's global lock. So the step is compiled on a thread while the state is made or read.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
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
from klbox_jax.train.checks import check_frozen
from klbox_jax.train.job import Job
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_and_create_state, lower_create_state
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.provenance import check_provenance
from klbox_jax.weights.weight_file import weights_digest


def init_or_restore(job: Job, checkpoints: Checkpoints) -> TrainState:
    """Returns the state that a run starts from, on all devices, and starts to compile its training step.

    The step is compiled on a thread, for the canvas of the first batch, unless no step is left to do. Its first call
    waits for the compiler. Other canvases are compiled when their first batch comes.

    Args:
        job: the run.
        checkpoints: the newest sound one is restored. If there is none, the state is new, with the weights of
            `config.model.init_weights` if that is set.

    Raises:
        CheckpointError, WeightFileError: a file cannot be used; the message names it.
    """
    on_all_devices, start = replicated(job.mesh), checkpoints.latest_step()
    init = lower_create_state(job.model, job.optimizer, batch=dummy_batch(job.preprocessing.canvases[0]))
    check_frozen(job.config.optimizer.frozen, init.out_info.params)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_all_devices), init.out_info
    )
    creating = None
    executor = ThreadPoolExecutor(2)
    if start is None:
        creating = executor.submit(compile_and_create_state, init, seed=job.config.seed)
    if (start or 0) < job.total_steps:
        batch = blank_batch(
            job.train_source,
            job.train_plan.step(start or 0),
            job.preprocessing,
            shard=Shard(jax.process_index(), jax.process_count()),
        )
        job.train_step.compile_ahead(abstract, put_batch(batch, job.mesh), executor=executor)
    # Not waited for, so that a fault of a checkpoint or of the weights shows at once.
    executor.shutdown(wait=False)
    if creating is None:
        return checkpoints.restore(abstract)
    state = creating.result()
    if job.config.model.init_weights:
        state = state.replace(params=_initial_params(job, state.params))
    return jax.device_put(state, on_all_devices)


def _initial_params(job: Job, params: dict[str, Any]) -> dict[str, Any]:
    """Fills parameters from `config.model.init_weights`; the log and weights.json list what was loaded."""
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
            # A box coder is written as its name and weights.
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
    """Returns a batch of one black image, with which a model is initialized; only its shapes matter."""
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
    # Made by NumPy, because each `jnp.zeros` and the like would compile a program.
    return jax.tree.map(jnp.asarray, batch)
