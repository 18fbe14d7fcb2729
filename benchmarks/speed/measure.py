"""What a measure is, and how its two sides are run in turn.

Both libraries live in one process and use the same number of threads. Only one of them works at a time, and the
idle threads of the other go to sleep within a millisecond, so they do not disturb each other: processes of their
own would share the cores in the same way, and only part the allocators. What has to begin with a fresh process
(start, memory) does so in its own measure.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

# Pairs that are run in any case, however long they take.
FEWEST_PAIRS = 3


@dataclasses.dataclass(frozen=True)
class Sides:
    """The two functions of a measure; each runs once and returns its value in the measure's unit.

    Attributes:
        ours: what is measured.
        peer: what it is held against: another library, another setting of ours, or a limit.
    """

    ours: Callable[[], float]
    peer: Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One row of the table.

    Attributes:
        name: unique.
        against: what the peer is, in a few words.
        unit: of both values.
        must: the largest ratio of ours over the peer's that is good enough.
        goal: the ratio that is wanted.
        prepare: builds both sides; compiles nothing yet.
        pairs: how often each side is run.
        seconds: after so long, no further pair is begun.
        warm_up: run each side once before it counts: it compiles.
        needs_torch: whether the peer is torchvision.
    """

    name: str
    against: str
    unit: str
    must: float
    goal: float
    prepare: Callable[[], Sides]
    pairs: int = 30
    seconds: float = 60.0
    warm_up: bool = True
    needs_torch: bool = False


@dataclasses.dataclass(frozen=True)
class Values:
    """What the sides returned, pair by pair."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]


def run_in_turn(sides: Sides, *, pairs: int, seconds: float, warm_up: bool) -> Values:
    """Returns the values of both sides, run in turn, so that what slows the machine slows both.

    Which of the two is first changes from pair to pair. At least `FEWEST_PAIRS` are run, or all where there are to
    be fewer.
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
    """Returns a function that runs another one to its end, and returns `share` of the seconds that took.

    Several `calls` in a row, of which it returns the mean, are for a function of less than a millisecond: what it costs
    at work, without waking the processor's caches from whatever ran before.
    """

    def run() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return share * (time.perf_counter() - started) / calls

    return run
