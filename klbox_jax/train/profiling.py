"""A profiler trace of the steps of `config.train.profile_steps`."""

import pathlib
from typing import Any

import jax
from absl import logging

from klbox_jax.distributed import is_writer


class Profile:
    """Traces a range of steps with jax.profiler; a context manager, which also ends an interrupted trace.

    TensorBoard's profile plugin and Perfetto read the trace. Only process 0 is traced.
    """

    def __init__(self, steps: tuple[int, ...], folder: pathlib.Path):
        """Takes a `config.train.profile_steps` that passed `check_profile_steps`, and the folder to write to."""
        self._first, self._last = steps if steps and is_writer() else (0, 0)
        self._folder = folder
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts the trace if the step is in the range; call it before each step.

        A run that resumes inside the range is traced from there.
        """
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after the last step of the range, whose `results` it waits for; call it after each step."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("a trace of steps %d to %d is in %s", self._first, self._last, self._folder)
