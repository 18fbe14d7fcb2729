"""Runs the phases, each in a process of its own, and collects what they have measured."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from benchmarks.accelerator.outcomes import FAILED, skipped
from benchmarks.accelerator.plan import Cell, Phase

ROOT = pathlib.Path(__file__).parents[2]
# Kept for writing the results.
RESERVED_SECONDS = 5.0
# For a process to finish its last measurement.
GRACE_SECONDS = 15.0
# JAX takes its share of the device's memory at once; torch is not running then.
WORKER_ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "1"}


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of a run.

    Attributes:
        folder: of the results, and of the processes' logs.
        tiny: use `sizes.TINY`.
        started: seconds since the epoch.
        seconds: length of the whole run.
    """

    folder: pathlib.Path
    tiny: bool
    started: float
    seconds: float

    def deadline(self, share: float) -> float:
        """Returns the time after which a phase begins nothing new."""
        return self.started + share * (self.seconds - RESERVED_SECONDS - GRACE_SECONDS)


@dataclasses.dataclass
class Collected:
    """Results of the processes so far.

    Attributes:
        outcomes: outcome of each cell by its name.
        environments: devices and versions of each side.
    """

    outcomes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def run_phase(phase: Phase, run: Run, collected: Collected) -> None:
    """Measures the cells of a phase and adds their outcomes.

    Where the process dies, the group of cells that it was at has failed, and another process measures the others.
    """
    waiting = list(phase.cells)
    while waiting and time.time() < run.deadline(phase.until):
        began, unfinished = _run_process(phase, waiting, run, collected)
        for name in began:
            collected.outcomes.setdefault(name, unfinished)
        before, waiting = waiting, [cell for cell in waiting if cell.name not in collected.outcomes]
        if len(waiting) == len(before):  # it does not even start
            collected.outcomes |= {cell.name: unfinished for cell in waiting}
            return
    collected.outcomes |= {cell.name: skipped("no time was left") for cell in waiting}


def _run_process(
    phase: Phase, cells: list[Cell], run: Run, collected: Collected
) -> tuple[list[str], dict[str, Any]]:
    """Runs one process; returns the names of the cells that it began, and the outcome of those it did not finish."""
    deadline = run.deadline(phase.until)
    attempt = len(list(run.folder.glob("events_*.jsonl")))
    events, log = (run.folder / f"{name}_{attempt}_{phase.side}" for name in ("events", "log"))
    events = events.with_suffix(".jsonl")
    command = [sys.executable, "-m", "benchmarks.accelerator.worker", f"--side={phase.side}"]
    command += [f"--cells={json.dumps([cell.name for cell in cells])}", f"--events={events}"]
    command += [f"--deadline={deadline}"] + ["--tiny"] * run.tiny
    with log.with_suffix(".txt").open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, env=WORKER_ENVIRONMENT | os.environ)
        try:
            status = process.wait(timeout=max(0.0, deadline - time.time()) + GRACE_SECONDS)
            reason = f"the process ended with status {status}; see {log.name}.txt"
            unfinished = {"status": FAILED, "reason": reason}
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            unfinished = skipped("stopped at the end of the time")
    began: list[str] = []
    for line in events.read_text(encoding="utf-8").splitlines() if events.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        began += event.get("started", [])
        collected.environments.update({phase.side: event["environment"]} if "environment" in event else {})
        if "cell" in event:
            collected.outcomes[event["cell"]] = event["outcome"]
    return began, unfinished
