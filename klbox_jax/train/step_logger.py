"""Logs step metrics to file and console, and stops or skips on NaN/Inf."""

import contextlib
import math
import time

import jax
import numpy as np
from absl import logging

from klbox_jax.train.checkpoints import newest_sound_step
from klbox_jax.train.job import Job
from klbox_jax.train.writer import MetricWriter, Progress, last_value

# A run that skips this many steps in a row does not recover.
MOST_SKIPPED_IN_A_ROW = 100


class Clock:
    """Measures the seconds of training, and the share of them spent waiting for data."""

    def __init__(self, *, seconds: float):
        """Starts at the seconds that earlier starts of the run took."""
        self._before = seconds
        self._start = time.perf_counter()
        self._wait = 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Counts the block as waiting for data."""
        started = time.perf_counter()
        yield
        self._wait += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self):
        """Does not count the block."""
        started = time.perf_counter()
        yield
        self._start += time.perf_counter() - started

    def numbers(self) -> dict[str, float]:
        """Returns the time metrics of a record."""
        elapsed = time.perf_counter() - self._start
        return {"train/seconds": self._before + elapsed, "train/data_wait_share": self._wait / elapsed}


class StepLogger:
    """Logs the metrics of every step, in order.

    It reads the metrics of a step while the next step runs, so that the device never waits for the host.
    """

    def __init__(self, job: Job, *, writer: MetricWriter, progress: Progress, clock: Clock):
        """Continues the count of skipped steps that the run has recorded so far."""
        self._job = job
        self._writer = writer
        self._progress = progress
        self._clock = clock
        self._skipped = int(last_value(job.workdir, "train/skipped_steps"))
        self._skipped_in_a_row = 0
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def add(self, step: int, scalars: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step, and logs those of the step before.

        Raises:
            FloatingPointError: a metric of the step before is not finite and `config.train.on_nonfinite` is `stop`; or
                it is `skip`, and too many steps in a row were skipped.
        """
        if self._pending is not None:
            self._log(*self._pending)
        self._pending = (step, scalars)

    def flush(self) -> None:
        """Logs the last step now, and writes its record whatever `config.train.log_every` is; raises as `add`."""
        if self._pending is not None:
            self._log(*self._pending, always_write=True)
        self._pending = None

    def _log(self, step: int, scalars: dict[str, jax.Array], *, always_write: bool = False) -> None:
        config = self._job.config.train
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        numbers = {f"train/{name}": value for name, value in values.items()} | self._clock.numbers()
        if config.on_nonfinite == "skip":
            self._skipped += bool(nonfinite)
            numbers["train/skipped_steps"] = self._skipped
        # The record of a skipped step carries the count of skipped steps over an interruption.
        if nonfinite or always_write or step % config.log_every == 0:
            self._writer.write(step, numbers)
        if nonfinite:
            self._skipped_in_a_row += 1
            self._stop_or_skip(step, nonfinite)
        else:
            self._skipped_in_a_row = 0
        self._progress.update(step, loss=values["total_loss"])

    def _stop_or_skip(self, step: int, nonfinite: list[str]) -> None:
        what = f"step {step}: {', '.join(nonfinite)} not finite, on images {self._image_ids(step)}"
        if self._job.config.train.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{what}; {self._last_sound()}; lower config.optimizer.learning_rate or config.optimizer.clip_norm, or "
                "skip such batches with config.train.on_nonfinite = 'skip', and start again with --allow_config_change"
            )
        logging.warning("%s; the step changes nothing, as %d before it", what, self._skipped - 1)
        if self._skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{what}, like all of the {MOST_SKIPPED_IN_A_ROW} steps up to it; {self._last_sound()}; lower "
                "config.optimizer.learning_rate or config.optimizer.clip_norm, and start again with "
                "--allow_config_change"
            )

    def _image_ids(self, step: int) -> list[int]:
        plan = self._job.train_plan.step(step - 1)
        return [self._job.train_source.records[index].image_id for index in np.asarray(plan.indices)]

    def _last_sound(self) -> str:
        folder = self._job.workdir.checkpoints
        step = newest_sound_step(folder)
        if step is None:
            return f"{folder} has no sound checkpoint yet"
        return f"the last sound checkpoint, of step {step} in {folder}, is as it was"
