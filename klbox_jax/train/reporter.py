"""What becomes of the numbers of each step: the log, the files, and what a number that is not finite leads to."""

import contextlib
import math
import time

import jax
import numpy as np
from absl import logging

from klbox_jax.train.checkpoints import newest_sound_step
from klbox_jax.train.job import Job
from klbox_jax.train.writer import MetricWriter, Progress

# A run of which this many steps in a row were skipped does not come back.
MOST_SKIPPED_IN_A_ROW = 100


class Clock:
    """Seconds of training, and how many of them were spent waiting for data."""

    def __init__(self, *, seconds: float):
        self._before = seconds
        self._start = time.perf_counter()
        self._wait = 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Counts the block as waiting."""
        started = time.perf_counter()
        yield
        self._wait += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self):
        """Does not count the block at all."""
        started = time.perf_counter()
        yield
        self._start += time.perf_counter() - started

    def numbers(self) -> dict[str, float]:
        """Returns what a record tells of the time."""
        elapsed = time.perf_counter() - self._start
        return {"train/seconds": self._before + elapsed, "train/data_wait_share": self._wait / elapsed}


class Reporter:
    """Reads the numbers of every step, in order, and writes them where it is their turn."""

    def __init__(self, job: Job, *, writer: MetricWriter, progress: Progress, clock: Clock, skipped: int):
        """Takes where to write, and how many steps of the run were skipped before."""
        self._job = job
        self._writer = writer
        self._progress = progress
        self._clock = clock
        self._skipped = skipped
        self._skipped_in_a_row = 0

    def __call__(self, step: int, scalars: dict[str, jax.Array], *, log: bool = False) -> None:
        """Reports a step; `log` writes it though it is not its turn.

        Raises:
            FloatingPointError: a number is not finite, and `config.train.on_nonfinite` is `stop`; or it is
                `skip`, and nothing but skipped steps has come for a long time.
        """
        config = self._job.config.train
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        numbers = {f"train/{name}": value for name, value in values.items()} | self._clock.numbers()
        if config.on_nonfinite == "skip":
            self._skipped += bool(broken)
            numbers["train/skipped_steps"] = self._skipped
        # The record of a skipped step carries their count over an interruption.
        if broken or log or step % config.log_every == 0:
            self._writer.write(step, numbers)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if broken else 0
        if broken:
            what = f"step {step}: {', '.join(broken)} not finite, on images {self._image_ids(step)}"
            if config.on_nonfinite == "stop":
                raise FloatingPointError(
                    f"{what}; {self._last_sound()}; lower config.optimizer.learning_rate or "
                    "config.optimizer.clip_norm, or pass over such batches with config.train.on_nonfinite = 'skip', "
                    "and start again, with --allow_config_change"
                )
            logging.warning("%s; the step changes nothing, as %d before it", what, self._skipped - 1)
            if self._skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"{what}, like all of the {MOST_SKIPPED_IN_A_ROW} steps up to it; {self._last_sound()}; lower "
                    "config.optimizer.learning_rate or config.optimizer.clip_norm, and start again, with "
                    "--allow_config_change"
                )
        self._progress.update(step, loss=values["total_loss"])

    def _image_ids(self, step: int) -> list[int]:
        plan = self._job.train_plan.step(step - 1)
        return [self._job.train_source.records[index].image_id for index in np.asarray(plan.indices)]

    def _last_sound(self) -> str:
        folder = self._job.workdir.checkpoints
        step = newest_sound_step(folder)
        if step is None:
            return f"{folder} has no sound checkpoint yet"
        return f"the last sound checkpoint, of step {step} in {folder}, is as it was"
