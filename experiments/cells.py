"""Cells of tables from the numbers in docs/results: a column makes the cell of each line from the line's key."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from klbox_jax.files import read_json
from klbox_jax.report.columns import interval_text
from klbox_jax.report.paper import PAPER_TABLE4, Cell
from klbox_jax.report.tables import markdown_table, marked, paper_cells

RESULTS = pathlib.Path(__file__).parents[1] / "docs/results"

Column = Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a document.

    Attributes:
        title: heading of the first column.
        lines: the text of the first column by the line's key, which is the name of a row or a pair of them.
        columns: heading of each further column, and what makes its cells.
    """

    title: str
    lines: Mapping[Any, str]
    columns: Sequence[tuple[str, Column]]

    def __call__(self) -> str:
        """Returns the table in Markdown."""
        headings = [heading for heading, _ in self.columns]
        cells = [[text, *(cell(key) for _, cell in self.columns)] for key, text in self.lines.items()]
        return markdown_table([self.title, *headings], cells)


@functools.cache
def read(file: str) -> dict[str, Any]:
    """Returns a JSON file of docs/results."""
    return read_json(RESULTS / file)


def row_of(file: str, name: str) -> dict[str, Any]:
    """Returns the row of a name; an empty one where there is none."""
    return next((row for row in read(file)["rows"] if row["name"] == name), {})


def value(file: str, metric: str, form: str = ".1f") -> Column:
    """The number of a row."""

    def cell(name: str) -> str:
        number = row_of(file, name).get(metric)
        return "-" if number is None else format(number, form)

    return cell


def mean_and_std(file: str, metric: str) -> Column:
    """The mean of a row over the seeds, and its standard deviation."""

    def cell(name: str) -> str:
        row = row_of(file, name)
        return f"{row[metric]:.1f} ± {row['std'][metric]:.1f}"

    return cell


def across(metric: str, name: str) -> Column:
    """The number of one row, where each line is another file."""
    return lambda file: value(file, metric)(name)


def gain(file: str, metric: str) -> Column:
    """The number of a row less that of its baseline; nothing for the baseline itself."""

    def cell(name: str) -> str:
        head, slash, row = name.rpartition("/")
        base = row_of(file, f"{head}{slash}baseline")[metric]
        return "" if row == "baseline" else f"{round(row_of(file, name)[metric] - base, 1) + 0.0:+.1f}"

    return cell


def difference(file: str, metric: str, part: str) -> Column:
    """Of a pair of rows, the `mean` difference, its `by_seed`, or its interval over `seeds` or `images`."""

    def cell(pair: tuple[str, str]) -> str:
        found = {(one["row"], one["base"], one["metric"]): one for one in read(file)["differences"]}
        if (*pair, metric) not in found:
            raise ValueError(f"{RESULTS / file} has no difference of {pair[0]} and {pair[1]} in {metric}")
        one = found[*pair, metric]
        if part == "mean":
            return f"{one['mean']:+.2f}"
        if part == "by_seed":
            return " ".join(f"{number:+.2f}" for number in one["by_seed"])
        return interval_text(one[f"interval_{part}"])

    return cell


def paper_value(cells: Mapping[str, Cell]) -> Column:
    """The paper's number, with the mark of how it is known."""
    return lambda name: marked(f"{cells[name][0]:.1f}", cells[name][1])


def paper_gain(table: Mapping[str, Mapping[str, Cell]]) -> Column:
    """What the paper's row gains in AP over its baseline; nothing for the baseline itself."""
    return lambda name: "" if name.endswith("baseline") else paper_cells(name, table, ["AP"])[1]


def paper_ratio(name: str) -> str:
    """The paper's milliseconds over those of its baseline."""
    milliseconds, mark = PAPER_TABLE4.get(name, (None, ""))
    return "-" if milliseconds is None else marked(f"{milliseconds / PAPER_TABLE4['baseline'][0]:.2f}", mark)


def copied(file: str) -> Callable[[], str]:
    """A Markdown file of docs/results, as it is."""
    return lambda: (RESULTS / file).read_text(encoding="utf-8").strip()
