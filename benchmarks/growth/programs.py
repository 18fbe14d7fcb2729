"""The training step and the eval step of a setting: compiled, weighed by the compiler's own account, and timed."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.growth.settings import Setting, make_config
from benchmarks.speed.detector import CANVAS, LEARNING_RATE, make_batch, random_params, shapes_of
from klbox_jax import distributed
from klbox_jax.evaluation.eval_step import compile_eval_step
from klbox_jax.models.build import build_model
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch
from klbox_jax.train.optimizer import build_optimizer
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_train_step

STEPS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that is traced and lowered, and the arrays it runs on.

    Attributes:
        lowered: of `jax.jit`.
        arguments: the state, or the parameters, and the batch, in NumPy.
        mesh: the devices.
        seconds: of tracing and lowering.
        digest: of its StableHLO text: programs of one digest are the same.
        gradient_bytes: of the parameters, all of which are trained.
    """

    lowered: Any
    arguments: tuple[Any, Batch]
    mesh: Mesh
    seconds: float
    digest: str
    gradient_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step costs on one machine.

    Attributes:
        seconds: of one step, the median.
        compile_seconds: of tracing, lowering and compiling it.
        bytes: see `held_bytes`.
    """

    seconds: float
    compile_seconds: float
    bytes: int


def fit_batch(setting: Setting) -> Batch:
    """Returns the batch of the speed measures in a setting's canvas, slots and classes."""
    batch = make_batch(setting.batch)
    scale = np.array(setting.canvas, np.float32) / np.array(CANVAS, np.float32)
    repeats = -(-np.array(setting.canvas) // np.array(CANVAS))
    images = np.tile(batch.images, (1, *repeats, 1))[:, : setting.canvas[0], : setting.canvas[1]]
    gt = batch.gt.replace(
        boxes=(batch.gt.boxes * np.tile(scale[::-1], 2)).astype(np.float32),
        classes=batch.gt.classes % setting.classes,
    )
    empty = setting.gt_slots - gt.valid.shape[1]

    def pad(rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, [(0, 0), (0, empty)] + [(0, 0)] * (rows.ndim - 2))

    return batch.replace(
        images=np.ascontiguousarray(images),
        image_size=np.tile(np.array(setting.canvas, np.int32), (setting.batch, 1)),
        gt=jax.tree.map(pad, gt),
    )


# The base, and the setting that was compared with it and is measured next.
@functools.lru_cache(maxsize=2)
def lower(kind: str, setting: Setting, *, clock: Callable[[], float] = time.perf_counter) -> Program:
    """Returns the step `train` or `eval` of a setting, over all devices of this process."""
    config = make_config(setting)
    model = build_model(config.model, num_classes=setting.classes)
    params = random_params(shapes_of(model, setting.canvas))
    mesh = distributed.make_mesh()
    if kind == "train":
        config.optimizer.learning_rate = LEARNING_RATE
        optimizer, schedule = build_optimizer(
            config.optimizer, batch_size=setting.batch, accumulate_steps=1, total_steps=1000
        )
        first = TrainState(step=np.zeros((), np.int32), params=params, opt_state=optimizer.init(params))
        step = compile_train_step(mesh, model=model, optimizer=optimizer, schedule=schedule, seed=0)
    else:
        first = params
        settings = {"": PostprocessSettings(**config.postprocess.to_dict())}
        step = compile_eval_step(mesh, model=model, settings=settings)
    arguments = (first, fit_batch(setting))
    # Every program begins cold: else the first one would be charged for what all others share.
    jax.clear_caches()
    started = clock()
    lowered = step.lower(*arguments)
    seconds = clock() - started
    return Program(
        lowered=lowered,
        arguments=arguments,
        mesh=mesh,
        seconds=seconds,
        digest=hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        gradient_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    )


@functools.cache
def measure(kind: str, setting: Setting, *, clock: Callable[[], float], seconds: float, fewest: int) -> Cost:
    """Compiles a step, runs it for so many seconds and at least so often, and returns its cost.

    Args:
        kind: of `STEPS`.
        setting: of the step.
        clock: `time.perf_counter`, or `time.process_time` for all cores' work, whatever else the machine does.
        seconds: of running.
        fewest: runs.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    program = lower(kind, setting, clock=clock)
    started = clock()
    compiled = program.lowered.compile()
    compile_seconds = program.seconds + clock() - started
    run = runner(kind, compiled, program)
    run()
    times: list[float] = []
    while len(times) < fewest or sum(times) < seconds:
        started = clock()
        run()
        times.append(clock() - started)
    return Cost(float(np.median(times)), compile_seconds, held_bytes(compiled))


def runner(kind: str, compiled: Any, program: Program) -> Callable[[], None]:
    """Returns a function that takes one step to its end; a training step goes on from the one before."""
    first, batch = program.arguments
    first = jax.device_put(first, distributed.replicated(program.mesh))
    batch = distributed.put_batch(batch, program.mesh)

    def train() -> None:
        nonlocal first
        first, scalars = compiled(first, batch)
        if not np.isfinite(scalars["total_loss"]):
            raise FloatingPointError("the loss of the training step is not finite")
        jax.block_until_ready(first)

    def evaluate() -> None:
        jax.block_until_ready(compiled(first, batch))

    return train if kind == "train" else evaluate


def held_bytes(compiled: Any) -> int:
    """Returns the bytes that a device holds for a program: arguments, results and temporary arrays.

    By the compiler's plan, exact without a run. Results that take the place of arguments count once.
    """
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
