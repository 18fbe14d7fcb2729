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
    """The two functions of a measure; each runs once and returns its value in the measure's unit.

    Attributes:
        ours: the measured side.
        peer: the side it is compared with: another library, another setting of ours, or a limit.
    """

    ours: Callable[[], float]
    peer: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        name: unique.
        against: the peer, in a few words.
        prepare: builds both sides; compiles nothing yet.
        must: the largest ratio of ours over the peer's that is good enough.
        goal: the ratio that is wanted.
        unit: of both values.
        pairs: number of runs of each side.
        seconds: after this time no further pair is begun.
        warm_up: run each side once before it counts: it compiles.
        needs_torch: the peer is torchvision.
    """

    name: str
    against: str
    prepare: Callable[[], Sides]
    _: dataclasses.KW_ONLY
    must: float
    goal: float
    unit: str = "s"
    pairs: int = 30
    seconds: float = 60.0
    warm_up: bool = True
    needs_torch: bool = False


@dataclasses.dataclass(frozen=True)
class Values:
    """The values that the sides returned, pair by pair."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]


def run_in_turn(sides: Sides, *, pairs: int, seconds: float, warm_up: bool) -> Values:
    """Returns the values of both sides, run in turn, so that what slows the machine slows both.

    The side that is first changes from pair to pair. At least `FEWEST_PAIRS` are run, or `pairs` if that is less.
    """
    if warm_up:
        sides.ours(), sides.peer()
    ours, peer = [], []
    started = time.perf_counter()
    while len(ours) < pairs:
        if len(ours) >= FEWEST_PAIRS and time.perf_counter() - started > seconds:
            break
        if len(ours) % 2:
            theirs, mine = sides.peer(), sides.ours()
        else:
            mine, theirs = sides.ours(), sides.peer()
        ours.append(mine)
        peer.append(theirs)
    return Values(tuple(ours), tuple(peer))


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

    Raises:
        ValueError: a name is unknown, or a chosen measure needs torchvision, which is not installed.
    """
    for start in only:
        if not any(measure.name.startswith(start) for measure in measures):
            raise ValueError(
                f"--only={start} is unknown; choose from {', '.join(measure.name for measure in measures)}"
            )
    chosen = tuple(
        measure for measure in measures if not only or any(measure.name.startswith(name) for name in only)
    )
    refused = [measure.name for measure in chosen if measure.needs_torch and not has_torch]
    if refused:
        raise ValueError(
            f"{', '.join(refused)} cannot run without torch and torchvision: `make speed` installs them; or name "
            "other measures with --only"
        )
    return chosen


def plan_text(measures: Sequence[Measure]) -> str:
    """Returns a line for each measure, and the most time that all may take after they are compiled."""
    lines = [
        f"{measure.name}: up to {measure.pairs} pairs in {measure.seconds:.0f} s, against {measure.against}"
        for measure in measures
    ]
    total = sum(measure.seconds for measure in measures)
    return "\n".join(
        [*lines, f"{len(measures)} measures, at most {total / 60:.0f} minutes and their preparations"]
    )
