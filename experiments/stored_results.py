"""The files of docs/results, one for each result, and the columns of tables made from them.

A file has the content of the table.json that an experiment wrote, with one line for each record of a list.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from klbox_jax.files import read_json, write_atomically
from klbox_jax.report.columns import MISSING, Column, format_number, interval_text, table
from klbox_jax.report.paper import Cell
from klbox_jax.report.tables import marked, paper_cells

RESULTS = pathlib.Path(__file__).parents[1] / "docs/results"
# Metrics with tables by class, edge and level, without which the rows by seed are stored.
SUMMARIZED = ("LRP", "PDQ", "uncertainty")

Cells = Callable[[Any], str]
Columns = Mapping[str, Cells] | Sequence[tuple[str, Cells]]


def store(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Writes the table.json of a workdir as docs/results/NAME.json, and returns that file.

    The rows of each seed, where there are several, are added as `by_seed`. The plot of AP over IoU, if there is one, is
    written as NAME.png.
    """
    result = read_json(workdir / "table.json")
    by_seed = [row for file in sorted(workdir.glob("seed*/table.json")) for row in read_json(file)["rows"]]
    if by_seed:
        result["by_seed"] = [_summarized(row) for row in by_seed]
    path = RESULTS / f"{name}.json"
    write_atomically(path, to_text(result))
    plot = workdir / "ap_over_iou.png"
    if plot.exists():
        # A palette of 128 colors is enough for a plot, and takes a quarter of the bytes.
        with Image.open(plot) as image:
            small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(path.with_suffix(".png"), optimize=True)
    return path


def _summarized(row: Mapping[str, Any]) -> dict[str, Any]:
    short = dict(row)
    for key in SUMMARIZED:
        if isinstance(row.get(key), dict):
            short[key] = {k: v for k, v in row[key].items() if not isinstance(v, (dict, list))}
    return short


def to_text(result: Mapping[str, Any]) -> str:
    """Returns the content of a file of docs/results: JSON in which each record of a list has a line."""

    def dump(value: Any) -> str:
        return json.dumps(value, sort_keys=True, allow_nan=False)

    def part(value: Any) -> str:
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            return "[\n  " + ",\n  ".join(map(dump, value)) + "\n ]"
        return dump(value)

    return "{\n " + ",\n ".join(f'"{key}": {part(result[key])}' for key in sorted(result)) + "\n}\n"


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Returns the result docs/results/NAME.json."""
    return read_json(RESULTS / f"{name}.json")


def row_of(name: str, row: str) -> dict[str, Any]:
    """Returns a row of a result; an empty one where there is none."""
    return next((one for one in read(name)["rows"] if one["name"] == row), {})


def value(name: str, metric: str, form: str = ".1f") -> Cells:
    """Returns the cells of a metric, by row."""
    return lambda row: format_number(row_of(name, row).get(metric), form)


def mean_and_std(name: str, metric: str) -> Cells:
    """Returns the cells of a mean over the seeds with its standard deviation, by row."""

    def cell(row: str) -> str:
        found = row_of(name, row)
        return f"{found[metric]:.1f} ± {found['std'][metric]:.1f}"

    return cell


def gain(name: str, metric: str) -> Cells:
    """Returns the cells of a metric less that of the row's baseline, by row; empty for the baseline itself."""

    def cell(row: str) -> str:
        head, slash, last = row.rpartition("/")
        base = row_of(name, f"{head}{slash}baseline")[metric]
        return "" if last == "baseline" else f"{round(row_of(name, row)[metric] - base, 1) + 0.0:+.1f}"

    return cell


def difference(name: str, metric: str, part: str) -> Cells:
    """Returns the cells of a difference, by pair of rows: `mean`, `by_seed`, or an interval, `seeds` or `images`."""

    def cell(pair: tuple[str, str]) -> str:
        found = {(one["row"], one["base"], one["metric"]): one for one in read(name)["differences"]}
        if (*pair, metric) not in found:
            raise ValueError(
                f"{RESULTS / name}.json has no difference of {pair[0]} and {pair[1]} in {metric}"
            )
        one = found[*pair, metric]
        if part == "mean":
            return f"{one['mean']:+.2f}"
        if part == "by_seed":
            return " ".join(f"{number:+.2f}" for number in one["by_seed"])
        return interval_text(one[f"interval_{part}"])

    return cell


def paper_value(cells: Mapping[str, Cell], form: str = ".1f", *, over: str = "") -> Cells:
    """Returns the cells of the paper's number, by row, with the mark of its source; over that of the row `over`."""

    def cell(row: str) -> str:
        if row not in cells:
            return MISSING
        number, mark = cells[row]
        return marked(format(number / cells[over][0] if over else number, form), mark)

    return cell


def paper_gain(cells: Mapping[str, Mapping[str, Cell]]) -> Cells:
    """Returns the cells of the paper's gain in AP over the baseline, by row; empty for the baseline itself."""
    return lambda row: "" if row.endswith("baseline") else paper_cells(row, cells, ["AP"])[1]


def table_of(title: str, lines: Mapping[Any, str], cells: Columns) -> Callable[[], str]:
    """Returns a function that makes a table.

    The first column has the heading `title` and the text of each line, by its key: the name of a row, or a pair of
    names. `cells` has the heading of each further column, and a function from the key to the cell.
    """
    pairs = cells.items() if isinstance(cells, Mapping) else cells
    columns = [Column(title, lines.__getitem__), *(Column(heading, cell) for heading, cell in pairs)]
    return lambda: table(columns, list(lines))
