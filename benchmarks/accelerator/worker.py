"""Process that measures the cells of one side and writes a line of JSON for each as soon as it is known.

It is started by `processes.py`. Each side has a process of its own, since JAX and torch each keep the device's memory.
"""

import argparse
import importlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.accelerator.outcomes import skipped
from benchmarks.accelerator.plan import OURS, PEER, all_cells, make_phases
from benchmarks.accelerator.sizes import FULL, TINY

# Neither side imports the other's framework.
MODULES = {OURS: "benchmarks.accelerator.ours", PEER: "benchmarks.accelerator.peer"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the cells in groups until they are done, or until too little time is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=sorted(MODULES), required=True)
    parser.add_argument("--cells", required=True, help="Names of cells, in JSON.")
    parser.add_argument(
        "--events", type=pathlib.Path, required=True, help="File that the lines are added to."
    )
    parser.add_argument("--deadline", type=float, required=True, help="Seconds since the epoch.")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)

    sizes = TINY if arguments.tiny else FULL
    by_name = {cell.name: cell for cell in all_cells(make_phases(sizes, has_peer=True))}
    cells = [by_name[name] for name in json.loads(arguments.cells)]
    side = importlib.import_module(MODULES[arguments.side])
    with arguments.events.open("a", encoding="utf-8") as events:

        def write(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        write(environment=side.environment())
        last_group_seconds = 0.0
        for group in side.group_cells(cells, sizes):
            started = time.time()
            # Groups differ: a group is begun where half the time of the last one is left.
            if started + last_group_seconds / 2 > arguments.deadline:
                for cell in group:
                    write(cell=cell.name, outcome=skipped("no time was left"))
                continue
            write(started=[cell.name for cell in group])
            for cell, outcome in side.measure_group(group, sizes):
                write(cell=cell.name, outcome=outcome)
                print(f"{cell.name}: {outcome.get('reason', outcome['status'])}", flush=True)
            last_group_seconds = time.time() - started


if __name__ == "__main__":
    main()
