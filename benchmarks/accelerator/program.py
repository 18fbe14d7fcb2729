"""Programs of our side: compiled several at a time, each with its compile time, memory and operations."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.steps import held_bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        compiled: runs it.
        compile_seconds: while other programs were compiled at the same time.
        device_bytes: memory of arguments, results and temporary arrays.
        xla_flops: operations that XLA counts in the program before its optimization; a loop's body counts once. None
            where it does not say.
    """

    compiled: Callable
    compile_seconds: float
    device_bytes: int
    xla_flops: float | None

    def record(self) -> dict[str, Any]:
        """Returns the numbers for the JSON file."""
        fields = ("compile_seconds", "device_bytes", "xla_flops")
        return {name: getattr(self, name) for name in fields}


@dataclasses.dataclass(frozen=True)
class Job:
    """A measurement of ours.

    Attributes:
        programs: functions that trace the programs it needs, by name.
        run: measures, given the compiled programs by name; returns the result for the JSON file.
    """

    programs: Mapping[str, Callable[[], jax.stages.Lowered]]
    run: Callable[[Mapping[str, Program]], dict[str, Any]]


def compile_program(lowered: jax.stages.Lowered) -> Program:
    """Compiles a program and reads its numbers."""
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    return Program(compiled, seconds, held_bytes(compiled), _xla_flops(lowered))


def _xla_flops(lowered: jax.stages.Lowered) -> float | None:
    try:
        costs = lowered.cost_analysis() or {}
    except (NotImplementedError, RuntimeError):  # the platform has no such analysis
        return None
    return costs.get("flops")
