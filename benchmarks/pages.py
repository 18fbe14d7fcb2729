"""Fills the tables of docs/speed.md and docs/scaling.md from docs/results/speed.json and growth.json.

    python -m benchmarks.pages            # writes the tables
    python -m benchmarks.pages --check    # fails if a table is out of date

`TABLES` has the tables by the names that the documents use (`klbox_jax/report/documents.py`).
"""

import functools
import pathlib
from typing import Any

from absl import flags

from benchmarks.growth.tables import devices_table, extrapolation_table, growth_table, verdict
from benchmarks.speed.table import records_table
from klbox_jax import cli
from klbox_jax.files import read_json
from klbox_jax.report import documents

DOCS = pathlib.Path(__file__).parents[1] / "docs"
DOCUMENTS = (DOCS / "speed.md", DOCS / "scaling.md")


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Returns the result docs/results/NAME.json."""
    return read_json(DOCS / "results" / f"{name}.json")


TABLES: documents.Tables = {
    "speed": lambda: records_table(read("speed")["measures"]),
    "verdict": lambda: verdict(read("growth")["axes"]),
    "training step": lambda: growth_table(read("growth")["axes"], "train"),
    "eval step": lambda: growth_table(read("growth")["axes"], "eval"),
    "devices": lambda: devices_table(read("growth")["devices"]),
    "accelerators": lambda: extrapolation_table(read("growth")["extrapolation"]),
}


def main(_: list[str]) -> None:
    """Writes the documents, or checks them."""
    command = "python -m benchmarks.pages"
    for document in documents.update(DOCUMENTS, TABLES, check=_CHECK.value, command=command):
        print(document)


if __name__ == "__main__":
    _CHECK = flags.DEFINE_bool("check", False, "Write nothing; fail if a document is out of date.")
    cli.start(main)
