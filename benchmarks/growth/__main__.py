"""Measures how cost grows with the size of the work and the number of devices, and extrapolates to many accelerators.

    export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456
    export MALLOC_ARENA_MAX=1
    python -m benchmarks.growth --output=runs/growth
    python -m benchmarks.growth --only=batch,devices --quick

Writes growth.json and scaling.png; `python -m benchmarks.pages` makes the tables of docs/scaling.md from the first.
Close other programs; `--quick` takes three sizes, and counts processor time instead of seconds. Parts that an earlier
call measured stay in growth.json until they are named again, so `--only=extrapolation` measures nothing.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags, logging

from benchmarks.growth import programs, tables
from benchmarks.growth.collectives import count_on
from benchmarks.growth.extrapolate import CHIPS, Work, extrapolate
from benchmarks.growth.fit import fit_growth
from benchmarks.growth.plot import plot_growth
from benchmarks.growth.settings import AXES, Axis, Setting
from benchmarks.growth.work import full_scale_work, gathered_bytes
from benchmarks.steps import KINDS
from klbox_jax import cli
from klbox_jax.files import read_json, write_json
from klbox_jax.train.workdir import current_versions

DEVICES = (1, 2, 4, 8)
# Numbers of devices of the extrapolation.
FLEET = (8, 64, 512)
# The first sizes of each axis in a quick trial; the fewest runs and seconds of each step, by `--quick`.
QUICK_SIZES = 3
FEWEST_RUNS = {True: 3, False: 5}
SECONDS = {True: 0.5, False: 2.0}


def main(_: list[str]) -> None:
    """Measures the parts that the flags choose, and writes the results after each step of an axis."""
    logging.set_verbosity(logging.WARNING)
    chosen = choose(_ONLY.value)
    # A compiled program from a cache would take no time.
    jax.config.update("jax_enable_compilation_cache", False)
    # Needed in any case, and computed before hours of measuring.
    full_scale_work()
    output = pathlib.Path(_OUTPUT.value)
    started = time.perf_counter()
    result = first_result(output / "growth.json", chosen, quick=_QUICK.value)
    fields = [axis.field for axis in AXES]

    def report(done: str) -> None:
        write(output, result)
        print(f"{time.perf_counter() - started:5.0f} s  {done}", flush=True)

    for axis in AXES:
        for kind in KINDS if axis.field in chosen else ():
            result["axes"].append(measure_axis(axis, kind, quick=_QUICK.value))
            result["axes"].sort(key=lambda record: fields.index(record["field"]))
            report(f"{axis.field}, {kind}")
    if "devices" in chosen:
        for devices in DEVICES[: 2 if _QUICK.value else None]:
            result["devices"] += count_on(devices)
            report(f"{devices} devices")
    report(str(output / "growth.json"))
    print(tables.verdict(result["axes"]))


def choose(only: list[str]) -> set[str]:
    """Returns the fields of the chosen axes, and `devices`; all where `only` is empty.

    Raises ValueError if a name is unknown.
    """
    known = [*(axis.field for axis in AXES), "devices", "extrapolation"]
    for name in only:
        if name not in known:
            raise ValueError(f"--only={name} is unknown; choose from {', '.join(known)}")
    return set(only or known)


def first_result(path: pathlib.Path, chosen: set[str], *, quick: bool) -> dict[str, Any]:
    """Returns the content of growth.json without the chosen parts, which are measured now.

    Raises:
        ValueError: parts that are not chosen were measured under other conditions, and would be lost or mixed with new
            ones.
    """
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    cores = len(os.sched_getaffinity(0))
    now = {"quick": quick, "cores": cores, "malloc": malloc, "versions": current_versions()}
    old = read_json(path) if path.exists() else {"axes": [], "devices": []}
    axes = [record for record in old["axes"] if record["field"] not in chosen]
    devices = [] if "devices" in chosen else old["devices"]
    changed = [name for name, value in now.items() if old.get(name) != value]
    if (axes or devices) and changed:
        raise ValueError(
            f"{path} holds parts of another {', '.join(changed)}: it has "
            f"{', '.join(str(old.get(name)) for name in changed)}; measure all parts, or give another --output"
        )
    return now | {"axes": axes, "devices": devices}


def measure_axis(axis: Axis, kind: str, *, quick: bool) -> dict[str, Any]:
    """Returns the record of a step along an axis: its costs at each size and their exponents, if it depends on it."""
    clock: Callable[[], float] = time.process_time if quick else time.perf_counter
    settings, sizes = axis.settings(), axis.sizes
    if quick:
        settings, sizes = settings[:QUICK_SIZES], sizes[:QUICK_SIZES]
    record = {"field": axis.field, "label": axis.label, "step": kind, "sizes": list(sizes)}
    base = programs.lower(kind, Setting(), clock=clock).digest
    if all(programs.lower(kind, one, clock=clock).digest == base for one in (settings[0], settings[-1])):
        return record | {"enters": False}
    runs = {"clock": clock, "seconds": SECONDS[quick], "fewest": FEWEST_RUNS[quick]}
    # The last one is lowered already.
    costs = {setting: programs.measure(kind, setting, **runs) for setting in reversed(settings)}
    columns = {name: [costs[setting][name] for setting in settings] for name in tables.QUANTITIES}
    growth = {name: fit_growth(sizes, column) for name, column in columns.items()}
    return record | {"enters": True, "costs": columns, "growth": growth}


def extrapolation(work: Work, gathered: float) -> list[dict]:
    """Returns the rows of the extrapolation: each chip on the fleets that it is wired for; GPUs with gathering too."""
    fleets = {chip: sorted({min(devices, chip.most_devices) for devices in FLEET}) for chip in CHIPS}
    rows = [(chip.name, extrapolate(chip, work, devices)) for chip in CHIPS for devices in fleets[chip]]
    if gathered:
        gathering = dataclasses.replace(work, gathered_bytes=gathered)
        name = f"{CHIPS[0].name}, gathering"
        rows += [(name, extrapolate(CHIPS[0], gathering, devices)) for devices in FLEET]
    return [{"chip": name} | step for name, step in rows]


def write(output: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes growth.json and, once an axis is measured, scaling.png."""
    work = full_scale_work()
    rows = extrapolation(work, gathered_bytes(result["devices"]))
    write_json(output / "growth.json", {**result, "work": dataclasses.asdict(work), "extrapolation": rows})
    if any(record["enters"] for record in result["axes"]):
        plot_growth(result["axes"], output / "scaling.png")


if __name__ == "__main__":
    _ONLY = flags.DEFINE_list("only", [], "Fields of axes, devices, extrapolation; all by default.")
    _OUTPUT = flags.DEFINE_string("output", "runs/growth", "Folder of growth.json and scaling.png.")
    _QUICK = flags.DEFINE_bool("quick", False, "Three sizes and few runs: a trial, not a result.")
    cli.start(main)
