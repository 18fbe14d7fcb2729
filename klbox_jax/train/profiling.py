"""A trace of some steps, for `config.train.profile_steps`."""

import pathlib
from typing import Any

import jax
from absl import logging

from klbox_jax.distributed import is_writer


class Profile:
    """Traces the steps `first` to `last` with jax.profiler; a context manager that also ends a broken-off trace.

    TensorBoard's profile plugin and Perfetto read what it writes. Process 0 alone is traced.
    """

    def __init__(self, steps: tuple[int, ...], folder: pathlib.Path):
        """Takes `config.train.profile_steps`, of which `check_profile_steps` has seen that it is sound."""
        self._first, self._last = steps if steps and is_writer() else (0, 0)
        self._folder = folder
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """To be called before a step is given to the devices; a run that resumes inside the range starts there."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """To be called with what a step returns; waits for the last step of the range, and for no other."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("a trace of steps %d to %d is in %s", self._first, self._last, self._folder)


def check_profile_steps(steps: tuple[int, ...], *, total_steps: int) -> None:
    """Raises ValueError if `config.train.profile_steps` is not empty and no range of the run's steps either."""
    if not steps:
        return
    whole = len(steps) == 2 and all(isinstance(step, int) for step in steps)
    if not whole or not 1 <= steps[0] <= steps[1] <= total_steps:
        raise ValueError(
            f"config.train.profile_steps = {steps} is no range of steps; write the first and the last one, such as "
            f"(11, 13), between 1 and {total_steps}, or () for no trace"
        )
