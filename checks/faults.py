"""Kills a training again and again, and checks that nothing is lost.

    python -m checks.faults --kills=20 --output=runs/faults

A tiny detector learns for 200 steps, saved every 20, by the ordinary command line: first undisturbed, then killed by
SIGKILL at random moments, half of them inside a save, and started again by the same command until it finishes. A
finished run is followed by a new one until there were enough kills. Each must end with the parameters, the optimizer,
the logged losses and the detections of the undisturbed one, to the bit. So must a run that was stopped by SIGTERM, and
two whose newest checkpoint is damaged: by a flipped bit, and by a file cut in half.

After each kill every checkpoint that should exist is read, and every JSON file. Everything runs on the CPU. Writes
faults.json, and exits with 1 if anything was lost, half-written or different.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging

from checks import faults_files as files
from klbox_jax import cli
from klbox_jax.files import write_json
from klbox_jax.train.workdir import Workdir

CONFIG = "configs/scenes.py:loss=kl,size=tiny"
NUM_STEPS = 200
SAVE_EVERY = 20
KEEP = 2
# The images are small too, so that most of the time goes into starts and saves.
FIELDS = {
    "data.short_side": 96,
    "data.long_side": 96,
    "data.canvases": ((96, 96),),
    "train.num_steps": NUM_STEPS,
    "train.save_every": SAVE_EVERY,
    "train.keep_checkpoints": KEEP,
    "evaluation.num_pictures": 0,
}
# Seconds that one start may take on a busy machine.
PATIENCE = 900.0
# Seconds that schedulers allow between SIGTERM and SIGKILL.
GRACE = 30.0
ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Tally:
    """The content of faults.json: counts, and the failures in words."""

    kills: int = 0  # by SIGKILL
    kills_in_save: int = 0  # kills that left an incomplete save
    runs: int = 0  # killed runs that went on to their end
    identical: int = 0  # kills of runs that ended like the undisturbed one
    lost_checkpoints: int = 0  # whole checkpoints that were missing or damaged after a kill
    half_written: int = 0  # result files that could not be read after a kill
    most_steps_lost: int = 0  # by one kill; at most `SAVE_EVERY`
    resumed_from: list[int] = dataclasses.field(
        default_factory=list
    )  # first step of each start that logged it
    failures: list[str] = dataclasses.field(default_factory=list)


def command(workdir: pathlib.Path, data_root: pathlib.Path) -> list[str]:
    """Returns the one command that starts a run and starts it again."""
    values = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    return [
        *(sys.executable, "-m", "klbox_jax.main", f"--config={CONFIG}"),
        *(*values, f"--config.data.root={data_root}", f"--workdir={workdir}", "--mode=train_and_eval"),
    ]


class Faults:
    """Starts runs, disturbs them, and counts."""

    def __init__(self, output: pathlib.Path, *, seed: int):
        """Empties the folders of the runs; compiled programs and generated data of earlier calls are used again."""
        self.output = output.absolute()
        self.rng = np.random.default_rng(seed)
        self.tally = Tally()
        for name in ("workdirs", "logs"):
            shutil.rmtree(self.output / name, ignore_errors=True)
            (self.output / name).mkdir(parents=True)
        self.reference = self.output / "workdirs" / "reference"
        self._starts = 0
        self._log = self.output / "logs" / "none"
        # Of an undisturbed run, and of a save.
        self._seconds = self._save_seconds = 0.0

    def run(self, kills: int) -> dict[str, Any]:
        """Runs all checks; returns the content of faults.json."""
        started = time.monotonic()
        self._undisturbed()
        while not self._enough(kills):
            self._killed(kills)
        further = {
            "sigterm_seconds": self._terminated(),
            "flipped": self._damaged("flip"),
            "truncated": self._damaged("truncate"),
            "seconds": round(time.monotonic() - started, 1),
        }
        return dataclasses.asdict(self.tally) | further

    def _enough(self, kills: int) -> bool:
        return self.tally.kills >= kills and 4 * self.tally.kills_in_save >= kills

    def _undisturbed(self) -> None:
        """Makes the reference, and a second run that reads the compiled programs, like all later ones."""
        with self._start(self.reference) as process:
            self._expect(process, 0)
        again = self.output / "workdirs" / "again"
        started, saves = time.monotonic(), []
        with self._start(again) as process:
            for begun in self.saves(process, again):
                while process.poll() is None and files.unfinished_saves(Workdir(again).checkpoints):
                    time.sleep(0.001)
                saves.append(time.monotonic() - begun)
            self._expect(process, 0)
        self._seconds, self._save_seconds = time.monotonic() - started, float(np.median(saves))
        self._compare(again)
        print(f"undisturbed: {self._seconds:.1f} s, each save {self._save_seconds:.2f} s", flush=True)

    def _killed(self, kills: int) -> None:
        """Kills one run until it finishes or there were enough kills."""
        self.tally.runs += 1
        run = self.output / "workdirs" / f"killed_{self.tally.runs}"
        whole: set[int] = set()
        own_kills, expected = 0, 0
        while True:
            with self._start(run) as process:
                if not self._enough(kills):
                    self._kill(process, run, left=1 - expected / NUM_STEPS)
                status = process.wait(PATIENCE)
            step = files.resumed_from(self._text())
            if own_kills and step is not None:
                self.tally.resumed_from.append(step)
            if step not in (None, expected):
                self._fail(f"{self._log.name}: went on from step {step}, not from {expected}")
            if status != -signal.SIGKILL:
                break
            own_kills += 1
            whole |= set(files.whole_steps(Workdir(run).checkpoints))
            expected = max(whole, default=0)
            self._inspect(run, whole)
        if status != 0:
            self._fail(f"{self._log.name}: ended with status {status}")
        elif self._compare(run):
            self.tally.identical += own_kills
            print(f"{run.name}: finished after {own_kills} kills, identical", flush=True)

    def _inspect(self, run: pathlib.Path, whole: set[int]) -> None:
        """Counts a kill, and the losses after it; `whole` are the steps that were ever completely saved."""
        checkpoints = Workdir(run).checkpoints
        in_save, newest = files.unfinished_saves(checkpoints), max(whole, default=0)
        self.tally.kills += 1
        self.tally.kills_in_save += bool(in_save)
        for lost in files.lost_checkpoints(checkpoints, whole, keep=KEEP):
            self.tally.lost_checkpoints += 1
            self._fail(f"{self._log.name}: checkpoint {lost} of {run.name} is lost")
        for name in files.half_written(run):
            self.tally.half_written += 1
            self._fail(f"{self._log.name}: {name} of {run.name} is half-written")
        steps_lost = max(0, files.last_recorded_step(run) - newest)
        self.tally.most_steps_lost = max(self.tally.most_steps_lost, steps_lost)
        if steps_lost > SAVE_EVERY:
            self._fail(f"{self._log.name}: {steps_lost} steps are lost")
        where = f"inside the save of step {max(in_save)}" if in_save else "outside of a save"
        print(f"kill {self.tally.kills}: {run.name}, {where}, step {newest} is whole", flush=True)

    def _kill(self, process: subprocess.Popen, run: pathlib.Path, *, left: float) -> None:
        """Kills at a random time of the share `left` of the run, or shortly after a save has begun."""
        if self.rng.random() < 0.5:
            self._wait(process, self.rng.uniform(0, left * self._seconds))
        else:
            number = int(self.rng.integers(1, 5))
            for _ in self.saves(process, run):
                number -= 1
                if number == 0:
                    self._wait(process, self.rng.uniform(0, self._save_seconds))
                    break
        process.kill()

    def _terminated(self) -> float:
        """Stops a run by SIGTERM and resumes it; returns the seconds until it stopped."""
        run = self.output / "workdirs" / "terminated"
        with self._start(run) as process:
            while process.poll() is None and files.last_recorded_step(run) == 0:
                time.sleep(0.01)
            self._wait(process, self.rng.uniform(0, 0.2 * self._seconds))
            sent = time.monotonic()
            process.terminate()
            self._expect(process, 143)
            seconds = round(time.monotonic() - sent, 2)
        if seconds > GRACE:
            self._fail(f"SIGTERM stopped the run after {seconds} s, not within {GRACE}")
        step = max(files.whole_steps(Workdir(run).checkpoints), default=0)
        if step != files.last_recorded_step(run):
            self._fail(f"SIGTERM left step {step} saved, and {files.last_recorded_step(run)} recorded")
        self._go_on(run, step)
        print(f"SIGTERM: stopped after {seconds} s, at step {step}", flush=True)
        return seconds

    def _damaged(self, how: str) -> str:
        """Damages the newest checkpoint of a finished run and resumes it; returns the file."""
        run = self.output / "workdirs" / how
        shutil.copytree(self.reference, run)
        checkpoints = Workdir(run).checkpoints
        name = files.damage(checkpoints / str(NUM_STEPS), self.rng, how=how)
        self._go_on(run, NUM_STEPS - SAVE_EVERY)
        if "is not sound and is skipped" not in self._text():
            self._fail(f"{self._log.name}: does not warn of {name}")
        if not (checkpoints / f"{NUM_STEPS}.unsound").is_dir():
            self._fail(f"{run.name}: the damaged checkpoint is not put aside")
        print(f"{how} {name}: goes on from the checkpoint before", flush=True)
        return name

    def _go_on(self, run: pathlib.Path, step: int) -> None:
        """Starts a run again; it should go on from `step` and end like the undisturbed one."""
        with self._start(run) as process:
            self._expect(process, 0)
        found = files.resumed_from(self._text())
        if found != step:
            self._fail(f"{self._log.name}: went on from step {found}, not from {step}")
        self._compare(run)

    def _compare(self, run: pathlib.Path) -> bool:
        found = files.differences(self.reference, run, step=NUM_STEPS)
        for difference in found:
            self._fail(f"{run.name} differs: {difference}")
        return not found

    def _start(self, run: pathlib.Path) -> "Started":
        self._starts += 1
        self._log = self.output / "logs" / f"{self._starts:03d}_{run.name}.txt"
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.output / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with self._log.open("wb") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            return Started(
                command(run, self.output / "data"), cwd=ROOT, env=os.environ | environment, **streams
            )

    def _text(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def saves(self, process: subprocess.Popen, run: pathlib.Path) -> Iterator[float]:
        """Yields the time whenever a save of the process begins."""
        checkpoints = Workdir(run).checkpoints
        seen, deadline = files.unfinished_saves(checkpoints), time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            found = files.unfinished_saves(checkpoints)
            if found - seen:
                yield time.monotonic()
            seen = found
            time.sleep(0.001)

    def _wait(self, process: subprocess.Popen, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

    def _expect(self, process: subprocess.Popen, status: int) -> None:
        if process.wait(PATIENCE) != status:
            tail = self._text()[-2000:]
            raise RuntimeError(f"{self._log} ended with {process.returncode}, not {status}:\n{tail}")

    def _fail(self, text: str) -> None:
        self.tally.failures.append(text)
        print(f"FAILURE: {text}", flush=True)


class Started(subprocess.Popen):
    """A process that does not outlive its `with` block."""

    def __exit__(self, *exception) -> None:
        self.kill()
        super().__exit__(*exception)


def main(_: list[str]) -> None:
    """Runs all checks, prints and writes the result, and exits with 1 after a failure."""
    logging.set_verbosity(logging.WARNING)  # orbax logs each restore
    output = pathlib.Path(_OUTPUT.value)
    result = {"seed": _SEED.value, **Faults(output, seed=_SEED.value).run(_KILLS.value)}
    write_json(output / "faults.json", result)
    print()
    for name, value in result.items():
        print(f"{name:18s} {value}")
    sys.exit(int(bool(result["failures"]) or result["identical"] < result["kills"]))


if __name__ == "__main__":
    _KILLS = flags.DEFINE_integer("kills", 20, "SIGKILLs; at least a quarter of them fall inside a save.")
    _OUTPUT = flags.DEFINE_string("output", "runs/faults", "Folder of the runs and of the result.")
    _SEED = flags.DEFINE_integer("seed", 0, "Another seed kills at other moments.")
    cli.start(main)
