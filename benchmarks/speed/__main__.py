"""Measures speed and memory against torchvision, a plain loop, a limit or another setting of ours, in one run.

    make speed
    python -m benchmarks.speed --preset=cpu --only=training_step,inference

The two sides of a measure run in turn, with the same number of threads. Medians, their ratio and its interval are
printed, and written to speed.json and speed.md. The whole table takes at most 25 minutes on two quiet cores. Close
other programs: on a busy machine the intervals are wide. `python -m benchmarks.pages` makes the table of docs/speed.md.
"""

import gc
import importlib.util
import os
import pathlib
import platform
import time
from typing import Any

import jax
from absl import flags, logging

from benchmarks.speed import (
    coco_evaluation,
    inference,
    memory,
    pipeline,
    roi_align,
    start,
    suppression,
    training,
)
from benchmarks.speed.measure import Measure, choose, plan_text, run_in_turn
from benchmarks.speed.table import record, row_text, table_markdown
from klbox_jax import cli
from klbox_jax.files import write_atomically, write_json
from klbox_jax.train.workdir import current_versions

# In the order of the table.
MEASURES: tuple[Measure, ...] = (
    *training.MEASURES,
    *inference.MEASURES,
    *roi_align.MEASURES,
    *suppression.MEASURES,
    *pipeline.MEASURES,
    *coco_evaluation.MEASURES,
    *start.MEASURES,
    *memory.MEASURES,
)
# Number of pairs of a quick trial.
QUICK_PAIRS = 3


def main(_: list[str]) -> None:
    """Runs the measures that the flags choose; writes the table after each of them."""
    logging.set_verbosity(logging.WARNING)
    # Every measure waits for its result, as torch and NumPy do on the thread that calls them. JAX would use another
    # thread, so that Python can continue, which makes 0.5 ms of a call of 0.4 ms.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    has_torch = importlib.util.find_spec("torch") is not None
    measures = choose(MEASURES, _ONLY.value, has_torch=has_torch)
    print(plan_text(measures), flush=True)
    versions, threads = current_versions(), len(os.sched_getaffinity(0))
    if has_torch:
        from benchmarks import torchvision_peer as peer

        peer.use_threads(threads)
        versions |= peer.versions()
    machine = {
        "processor": processor(),
        "cores": threads,
        "threads of each side": threads,
        # Of other programs, when it began.
        "load average": os.getloadavg()[0],
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", "not set"),
    }
    output = pathlib.Path(_OUTPUT.value)
    started, records = time.perf_counter(), []
    for measure in measures:
        pairs = min(QUICK_PAIRS, measure.pairs) if _QUICK.value else measure.pairs
        values = run_in_turn(measure.prepare(), pairs=pairs, seconds=measure.seconds, warm_up=measure.warm_up)
        records.append(record(measure, values))
        print(f"{time.perf_counter() - started:5.0f} s  {row_text(records[-1])}", flush=True)
        write(output, records, versions=versions, machine=machine)
        gc.collect()
    print((output / "speed.md").read_text())
    failed = [entry["name"] for entry in records if entry["mark"] == "FAIL"]
    print(
        f"{time.perf_counter() - started:.0f} seconds; {len(failed)} of {len(records)} measures fail: "
        f"{', '.join(failed) or 'none'}. {output / 'speed.json'}"
    )


def write(output: pathlib.Path, records: list[dict], *, versions: Any, machine: Any) -> None:
    """Writes speed.json and speed.md."""
    result = {"measures": records, "versions": versions, "machine": machine, "quick": _QUICK.value}
    write_json(output / "speed.json", result)
    versions_text = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "devices")
    meta = {**machine, "versions": versions_text}
    if _QUICK.value:
        meta["pairs"] = "few: a trial, not a result"
    write_atomically(output / "speed.md", table_markdown(records, meta=meta))


def processor() -> str:
    """Returns the processor's name, or its kind if the system does not give the name."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    # Not at the top: other programs have a flag of this name, and tests import them into one process.
    flags.DEFINE_enum("preset", "cpu", ["cpu"], "The sizes and limits; these are for two processor cores.")
    _ONLY = flags.DEFINE_list("only", [], "Names of measures, or what they begin with; all by default.")
    _OUTPUT = flags.DEFINE_string("output", "runs/speed", "Folder of speed.json and speed.md.")
    _QUICK = flags.DEFINE_bool("quick", False, "Few pairs of each: a trial, not a result.")
    cli.start(main)
