"""Correctness and speed on one accelerator, next to torchvision, in one run of at most eight minutes.

    python -m benchmarks.accelerator
    python -m benchmarks.accelerator --tiny --output=runs/accelerator_tiny

Needs jax, flax, optax, jaxtyping and absl-py, and torch with torchvision for the comparison; no network and no data.
Measurements are made in the order of their importance; what does not fit into the time or into the device's memory is
left out, and the page says so. Writes accelerator.json and accelerator.md. docs/accelerator.md explains the numbers.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.accelerator.requirements import has_peer, missing_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status: 1 where packages are missing or the correctness check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="Length of the run at most.")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/accelerator"))
    parser.add_argument("--tiny", action="store_true", help="A small network on small images, for a CPU.")
    arguments = parser.parse_args(argv)
    missing = missing_packages()
    if missing:
        names = " ".join(missing)
        print(f"error: not installed: {names}; run: {sys.executable} -m pip install {names}", file=sys.stderr)
        return 1
    return run(arguments.output, minutes=arguments.minutes, tiny=arguments.tiny)


def run(output: pathlib.Path, *, minutes: float, tiny: bool) -> int:
    """Measures phase by phase and writes the results after each; returns the exit status."""
    # Behind the check of the packages: these need some of them.
    from benchmarks.accelerator.environment import describe_host
    from benchmarks.accelerator.plan import all_cells, make_phases
    from benchmarks.accelerator.processes import ROOT, Collected, Run, run_phase
    from benchmarks.accelerator.results import failed_checks, write_results
    from benchmarks.accelerator.sizes import FULL, TINY

    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob("events_*.jsonl"), *output.glob("log_*.txt")):
        old.unlink()
    settings = Run(folder=output, tiny=tiny, started=time.time(), seconds=60 * minutes)
    sizes, with_peer = TINY if tiny else FULL, has_peer()
    phases, collected = make_phases(sizes, has_peer=with_peer), Collected()
    command = f"python -m benchmarks.accelerator --minutes={minutes:g}" + " --tiny" * tiny
    facts: dict[str, Any] = {"command": command, **describe_host(ROOT)}
    notes = (
        [] if with_peer else ["torch and torchvision are not installed, so nothing was compared with them."]
    )
    if tiny:
        notes.append(
            "A tiny run: it shows that everything works, and its speeds say nothing about the goals."
        )
    for phase in phases:
        run_phase(phase, settings, collected)
        facts["minutes"] = round((time.time() - settings.started) / 60, 2)
        goals = write_results(output, all_cells(phases), collected, facts=facts, notes=notes, sizes=sizes)
    for goal in goals:
        mark = {True: "met", False: "missed", None: "not measured"}[goal.met]
        print(f"{mark}: {goal.text}" + ("" if goal.value is None else f" ({goal.value:.4g})"))
    failures = failed_checks(all_cells(phases), collected.outcomes)
    for sentence in failures:
        print(f"wrong: {sentence}")
    print(f"{facts['minutes']} minutes; {output / 'accelerator.json'} and {output / 'accelerator.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
