"""Time of a call on an accelerator: the median of several samples after a warm-up."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP_CALLS = 2
FEWEST_SAMPLES, MOST_SAMPLES = 3, 15
# A sample is at least this long, so that one wait for the device does not count, but has no more than MOST_CALLS calls.
SAMPLE_SECONDS, MOST_CALLS = 0.1, 20


def median_seconds(
    call: Callable[[], Any], wait: Callable[[Any], Any], *, seconds: float
) -> dict[str, float | int]:
    """Measures a call that returns before the device has finished.

    A sample is a row of calls and one wait behind them, as in a training loop.

    Args:
        call: starts the work and returns its result.
        wait: returns once the device has computed the result of a call.
        seconds: no further sample starts after this time.

    Returns:
        `seconds` of one call (the median of the samples), `fastest` and `slowest` sample, and the number of `calls`.
    """
    for _ in range(WARM_UP_CALLS):
        wait(call())
    started = time.perf_counter()
    wait(call())
    once = max(time.perf_counter() - started, 1e-9)
    calls = max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / once)))
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < MOST_SAMPLES:
        if len(samples) >= FEWEST_SAMPLES and time.perf_counter() - began > seconds:
            break
        started = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        samples.append((time.perf_counter() - started) / calls)
    return {
        "seconds": statistics.median(samples),
        "fastest": min(samples),
        "slowest": max(samples),
        "calls": calls * len(samples),
    }
