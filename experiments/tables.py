"""What Tables 2 to 6 share: rows of one or several heads or backbones, and the files that come of them.

    table.md, table.json      our rows, the paper's numbers beside them

The networks lie elsewhere, as `experiments/networks.py` says. What is finished is skipped, what was interrupted
goes on. `--dry_run` prints the data, the commands, and what the trainings might take.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence

from experiments import networks, runs
from experiments.networks import Network
from experiments.rows import Row
from klbox_jax.files import write_atomically, write_json
from klbox_jax.report.paper import Cell
from klbox_jax.report.tables import METRICS, PaperNumbers, paper_table_markdown


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        name: of the experiment, such as `table2`.
        heads: by preset, the network families (keys of `networks.FAMILIES`) by the name of the head or backbone
            that stands before its rows' names; "" for a table of one family.
        rows: of every head.
        paper: the paper's numbers.
        setting: what they were measured on.
        mini: what stands for what at `--preset=mini`, for the notes.
        metrics: columns of ours.
        headlines: metrics whose value and gain in the paper stand beside our gains.
        voc: evaluate by VOC 2007's protocol too.
    """

    name: str
    heads: Mapping[str, Mapping[str, str]]
    rows: tuple[Row, ...]
    paper: Mapping[str, Mapping[str, Cell]]
    setting: str
    mini: str
    metrics: tuple[str, ...] = METRICS
    headlines: tuple[str, ...] = ("AP",)
    voc: bool = False

    def networks(self, preset: str) -> dict[tuple[str, Network], tuple[Row, ...]]:
        """Returns the rows of each head and network, in the order of the table."""
        return {
            (head, Network(family, loss)): tuple(row for row in self.rows if row.loss == loss)
            for head, family in self.heads[preset].items()
            for loss in dict.fromkeys(row.loss for row in self.rows)
        }


def write_table(
    table: PaperTable, rows: Sequence[Mapping], workdir: pathlib.Path, *, meta: Mapping[str, object]
) -> None:
    """Writes table.md and table.json."""
    text = paper_table_markdown(
        rows,
        PaperNumbers(
            cells=table.paper,
            setting=table.setting,
            comparable=meta["preset"] == "full",
            headlines=table.headlines,
            print_all=True,
        ),
        meta=meta,
        metrics=table.metrics,
    )
    write_json(workdir / "table.json", {"rows": rows, **meta})
    write_atomically(workdir / "table.md", text)


def run_table(table: PaperTable) -> None:
    """Runs what is missing of a table, and writes it."""
    started = time.perf_counter()
    preset, workdir = runs.check_preset(table.name, "mini", "full"), runs.workdir(table.name)
    wanted = table.networks(preset)
    if runs.DRY_RUN.value:
        print(networks.plan(table.name, [network for _, network in wanted]))
        return
    rows: list[dict] = []
    for (head, network), of_network in wanted.items():
        for entry in networks.train_and_evaluate(network, of_network, voc=table.voc):
            rows.append(entry | {"name": f"{head}/{entry['name']}" if head else entry["name"]})
        # Whoever looks in while it runs finds the table so far.
        meta = {
            "preset": preset,
            "data": rows[0]["data"],
            "data_fingerprint": rows[0]["data_fingerprint"],
            "machine": runs.machine(),
            "networks": str(network.workdir.parent),
        }
        if preset == "mini":
            meta["in miniature"] = table.mini
        write_table(table, rows, workdir, meta=meta)
    print((workdir / "table.md").read_text())
    print(f"{time.perf_counter() - started:.0f} seconds. Table in {workdir}, networks in {meta['networks']}.")
