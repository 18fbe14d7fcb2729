"""Metric writers (JSONL, TensorBoard) and the progress bar.

A line of `metrics.jsonl` is `{"step": 20, "time": 1700000000.0, "train/loss": 1.5, ...}`. JSON has no NaN and
no infinity; such a number is written as null, and the record lists it: `"nonfinite": {"train/loss": "nan"}`.
"""

import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from klbox_jax.distributed import is_writer
from klbox_jax.files import as_workdir_error, write_atomically
from klbox_jax.train.workdir import Workdir


class MetricWriter:
    """Appends metrics to a run's `metrics.jsonl` and TensorBoard files; a context manager.

    Every record is flushed to the operating system when `write` returns. Only process 0 writes.
    """

    def __init__(self, workdir: Workdir, *, resume_step: int | None = None, tensorboard: bool = True):
        """Opens the files.

        Args:
            workdir: the run's folder.
            resume_step: the step that training resumes from (0 at the start); records of later steps are removed,
                because they will be written again. None only appends, and may do so while another process writes.
            tensorboard: write event files too.

        Raises:
            WorkdirError: (also from the other methods) the disk is full, or the folder cannot be written to.
        """
        self._workdir = workdir
        self._file = None
        self._events = None
        if not is_writer():
            return
        with as_workdir_error(workdir.metrics):
            workdir.path.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and workdir.metrics.exists():
                _cut_after(workdir.metrics, resume_step)
            self._file = workdir.metrics.open("a", encoding="utf-8")
            if _ends_inside_a_line(workdir.metrics):
                self._file.write("\n")
        if tensorboard:
            with as_workdir_error(workdir.tensorboard):
                self._events = _EventFile(
                    workdir.tensorboard, purge_step=None if resume_step is None else resume_step + 1
                )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Records scalars of a step.

        Args:
            step: number of finished steps.
            numbers: Python, NumPy or JAX scalars; names like `train/loss_box`.

        Raises:
            ValueError: a name is one of the record's own ('step', 'time', 'nonfinite'), or a value is not one number.
        """
        if self._file is None:
            return
        values = {name: _number(name, value) for name, value in numbers.items()}
        record = {"step": int(step), "time": round(time.time(), 3)}
        if taken := values.keys() & {*record, "nonfinite"}:
            raise ValueError(f"a metric cannot be called {', '.join(sorted(taken))}")
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        record |= {name: None if name in nonfinite else value for name, value in values.items()}
        if nonfinite:
            record["nonfinite"] = nonfinite
        with as_workdir_error(self._workdir.metrics):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            with as_workdir_error(self._workdir.tensorboard):
                self._events.add_scalars(values, int(step))

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Records RGB pictures of a step in the TensorBoard files, if there are any."""
        if self._events is None:
            return
        with as_workdir_error(self._workdir.tensorboard):
            self._events.add_images(images, int(step))

    def close(self) -> None:
        """Flushes and closes the files."""
        file, events = self._file, self._events
        self._file = self._events = None
        try:
            if file is not None:
                with as_workdir_error(self._workdir.metrics):
                    file.close()
        finally:
            if events is not None:
                with as_workdir_error(self._workdir.tensorboard):
                    events.close()


class _EventFile:
    """A TensorBoard event file, written in the calling thread.

    tensorboardX's own `SummaryWriter` writes from another thread. A full disk ends that thread, and the training would
    then wait for it forever.
    """

    def __init__(self, folder: pathlib.Path, *, purge_step: int | None):
        # This import takes a tenth of a second, so it is left to runs that need it.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        if purge_step is not None:
            # TensorBoard hides earlier records from this step on.
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(self, values: Mapping[str, int | float], step: int) -> None:
        self._write([self._summary.scalar(name, value) for name, value in values.items()], step)

    def add_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        self._write([self._summary.image(name, x, dataformats="HWC") for name, x in images.items()], step)

    def close(self) -> None:
        self._writer.close()

    def _write(self, summaries: list[Any], step: int) -> None:
        for each in summaries:
            self._writer.write_event(self._event(summary=each, step=step, wall_time=time.time()))
        self._writer.flush()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a metrics file in the order written; skips incomplete lines."""
    lines = pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return [record for line in lines if (record := _parse(line)) is not None]


def last_value(workdir: Workdir, name: str) -> float | int:
    """Returns the value of a metric in its last record; 0 if there is none."""
    if not workdir.metrics.exists():
        return 0
    return next((r[name] for r in reversed(read_metrics(workdir.metrics)) if name in r), 0)


class Progress:
    """Shows the progress of a loop: a bar on a terminal, otherwise a line every few seconds.

    The rate counts the steps since the line before, without the time of compilers (`leave_out`). The first line has
    none.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        seconds_between_lines: int | float = 30,
        stream: io.TextIOBase | None = None,
    ):
        """Starts at `initial` of `total` steps; writes to standard error unless given a stream."""
        self._total = total
        self._initial = initial
        self._description = description
        self._stream = sys.stderr if stream is None else stream
        self._last: tuple[int, float] | None = None
        self._left_out = 0.0
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._bar = None
        self._interval = seconds_between_lines
        self._shown = is_writer()
        if self._shown and self._stream.isatty():
            import tqdm

            self._interval = 0.2
            self._bar = tqdm.tqdm(
                total=total, initial=initial, desc=description, file=self._stream, dynamic_ncols=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def update(self, step: int, **numbers: Any) -> None:
        """Sets the number of finished steps. JAX numbers are converted, and so waited for, only when they are shown."""
        self._pending = (step, numbers)
        now = time.monotonic()
        if self._last is None or now - self._last[1] >= self._interval:
            self._show(now)

    def leave_out(self, seconds: float) -> None:
        """Leaves seconds, such as those of a compiler, out of the rate and so of the remaining time."""
        self._left_out += seconds
        if self._bar is not None:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds

    def close(self) -> None:
        """Shows the last update, if it is not shown yet, and ends the line."""
        if self._pending is not None:
            self._show(time.monotonic())
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, now: float) -> None:
        step, numbers = self._pending
        self._pending = None
        if self._shown:
            texts = {name: f"{_number(name, value):.4g}" for name, value in numbers.items()}
            if self._bar is not None:
                self._bar.set_postfix(texts, refresh=False)
                self._bar.update(step - self._bar.n)
            else:
                self._stream.write(self._line(step, now, texts) + "\n")
                self._stream.flush()
        self._last, self._left_out = (step, now), 0.0

    def _line(self, step: int, now: float, texts: dict[str, str]) -> str:
        percentage = 100.0 * step / self._total if self._total else 100.0
        parts = [f"{percentage:5.1f}%", f"{step}/{self._total}"]
        seconds = 0.0 if self._last is None else now - self._last[1] - self._left_out
        if seconds > 0 and step > self._last[0]:
            rate = (step - self._last[0]) / seconds
            parts += [f"{rate:.3g} steps/s", f"ETA {_hours(max(self._total - step, 0) / rate)}"]
        parts += [f"{name} {text}" for name, text in texts.items()]
        return "  ".join([self._description, *parts] if self._description else parts)


def _cut_after(path: pathlib.Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for line in lines:
        record = _parse(line)
        if record is None or not line.endswith("\n"):
            logging.warning("%s: dropping an incomplete line: %.80r", path, line)
        elif record["step"] <= step:
            kept.append(line)
    if len(kept) < len(lines):
        logging.info("%s: removed %d lines after step %d", path, len(lines) - len(kept), step)
        write_atomically(path, "".join(kept))


def _ends_inside_a_line(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise ValueError(f"{name} must be one number, not {array.dtype} of shape {array.shape}")
    return array.item() if array.dtype.kind in "iu" else float(array.reshape(()))


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
