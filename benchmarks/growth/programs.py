"""The training step and the eval step of a setting: lowered, compiled, and timed."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.growth.settings import Setting, make_config
from benchmarks.steps import Step, held_bytes, make_batch, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that is traced and lowered."""

    step: Step  # with its arguments
    lowered: Any  # of `jax.jit`
    seconds: float  # of tracing and lowering
    digest: str  # of its StableHLO text: programs of one digest are the same


# The base, and the setting that was compared with it and is measured next.
@functools.lru_cache(maxsize=2)
def lower(kind: str, setting: Setting, *, clock: Callable[[], float] = time.perf_counter) -> Program:
    """Returns the step `train` or `eval` of a setting, over all devices of this process."""
    batch = make_batch(setting.batch, canvas=setting.canvas, classes=setting.classes, slots=setting.gt_slots)
    step = make_step(kind, make_config(setting), batch, classes=setting.classes)
    # Every program begins with empty caches: otherwise the first one would pay for the parts that all share.
    jax.clear_caches()
    started = clock()
    lowered = step.lower()
    seconds = clock() - started
    return Program(step, lowered, seconds, hashlib.sha256(lowered.as_text().encode()).hexdigest())


@functools.cache
def measure(kind: str, setting: Setting, *, clock: Callable[[], float], seconds: float, fewest: int) -> dict:
    """Compiles a step, runs it for some seconds and at least `fewest` times, and returns its cost.

    The cost has the median `seconds` of a step, the `compile_seconds` of tracing, lowering and compiling it, and the
    `bytes` of `held_bytes`.

    The clock is `time.perf_counter`, or `time.process_time` for the work of all cores, without that of other programs.
    Raises FloatingPointError if the loss is not finite.
    """
    program = lower(kind, setting, clock=clock)
    started = clock()
    compiled = program.lowered.compile()
    compile_seconds = program.seconds + clock() - started
    run = program.step.runner(compiled)
    run()
    times: list[float] = []
    while len(times) < fewest or sum(times) < seconds:
        started = clock()
        run()
        times.append(clock() - started)
    seconds_of_step = float(np.median(times))
    return {"seconds": seconds_of_step, "compile_seconds": compile_seconds, "bytes": held_bytes(compiled)}
