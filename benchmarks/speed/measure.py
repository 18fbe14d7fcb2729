"""Measures: two sides that run in turn, and the choice of measures for a run.

Both libraries are in one process and use the same number of threads. Only one of them works at a time, and the idle
threads of the other go to sleep within a millisecond, so they do not disturb each other: two processes would share the
cores in the same way, and only have separate allocators. Measures that must begin with a fresh process (start, memory)
start their own.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

# Pairs that are run in any case, however long they take.
FEWEST_PAIRS = 3


@dataclasses.dataclass(frozen=True)
class Sides:
    """The two functions of a measure; each runs once and returns its value in the measure's unit."""

    ours: Callable[[], float]  # the measured side
    peer: Callable[[], float]  # another library, another setting of ours, or a limit


@dataclasses.dataclass(frozen=True)
class Measure:
    """One row of the table."""

    name: str  # unique
    against: str  # the peer, in a few words
    prepare: Callable[[], Sides]  # builds both sides; compiles nothing yet
    must: float  # the largest ratio of ours over the peer's that is good enough
    goal: float  # the ratio that is wanted
    _: dataclasses.KW_ONLY
    unit: str = "s"  # of both values
    pairs: int = 30  # number of runs of each side
    seconds: float = 60.0  # after this time no further pair is begun
    warm_up: bool = True  # run each side once before it counts: it compiles

    @property
    def needs_torch(self) -> bool:
        """True if the peer is torchvision."""
        return self.against.startswith("torchvision's")


def run_in_turn(
    sides: Sides, *, pairs: int, seconds: float, warm_up: bool
) -> tuple[list[float], list[float]]:
    """Returns the values of ours and of the peer, run in turn, so that what slows the machine slows both.

    The side that is first changes from pair to pair. At least `FEWEST_PAIRS` are run, or `pairs` if that is less.
    """
    if warm_up:
        sides.ours(), sides.peer()
    ours, peer = [], []
    started = time.perf_counter()
    while len(ours) < pairs:
        if len(ours) >= FEWEST_PAIRS and time.perf_counter() - started > seconds:
            break
        turns = [(ours, sides.ours), (peer, sides.peer)]
        for values, side in reversed(turns) if len(ours) % 2 else turns:
            values.append(side())
    return ours, peer


def timed(function: Callable[[], Any], *, calls: int = 1, share: float = 1.0) -> Callable[[], float]:
    """Returns a function that runs another one to its end and returns `share` of the seconds.

    Several `calls` in a row, whose mean it returns, are for a function of less than a millisecond: its cost in steady
    work, without the processor's caches being cold from other work.
    """

    def run() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return share * (time.perf_counter() - started) / calls

    return run


def choose(measures: Sequence[Measure], only: Sequence[str], *, has_torch: bool) -> tuple[Measure, ...]:
    """Returns the measures whose names begin with one of `only`, or all of them.

    Raises ValueError if a name is unknown, or a chosen measure needs torchvision, which is not installed.
    """
    for start in only:
        if not any(measure.name.startswith(start) for measure in measures):
            raise ValueError(f"--only={start} is unknown; choose from {', '.join(m.name for m in measures)}")
    chosen = tuple(m for m in measures if not only or m.name.startswith(tuple(only)))
    refused = [measure.name for measure in chosen if measure.needs_torch and not has_torch]
    if refused:
        raise ValueError(
            f"{', '.join(refused)} cannot run without torch and torchvision: `make speed` installs them; or name "
            "other measures with --only"
        )
    return chosen


def plan_text(measures: Sequence[Measure]) -> str:
    """Returns a line for each measure, and the most time that all may take after they are compiled."""
    lines = [f"{m.name}: up to {m.pairs} pairs in {m.seconds:.0f} s, against {m.against}" for m in measures]
    minutes = sum(measure.seconds for measure in measures) / 60
    return "\n".join(
        [*lines, f"{len(measures)} measures, at most {minutes:.0f} minutes and their preparations"]
    )
