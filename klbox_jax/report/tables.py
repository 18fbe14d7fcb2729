"""Result tables in Markdown: a general table, and tables that compare our results with the KL Loss paper."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from klbox_jax.report.paper import PAPER_TABLE1, Cell

METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")
LABELS = ("name", "loss", "suppression", "voting")

# Sources of a number of the paper, most reliable first, and the mark of each.
_MARKS = {"read": "", "second-hand": "*", "derived": "~", "unverified": "?"}
_MEANINGS = {
    "second-hand": "`*` second-hand: quoted in another public report, not read in the paper.",
    "derived": "`~` derived: follows from other numbers, read or second-hand.",
    "unverified": "`( )?` unverified: from memory, not checked against a text; do not cite it as the paper's.",
}
_MISSING = "-"


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[str] = ()
) -> str:
    """Formats a Markdown table with aligned source, without a newline after the last row.

    Args:
        columns: headings.
        rows: cells in the order of the headings.
        text_columns: headings of the columns aligned to the left; the other columns, with numbers, are aligned to the
            right. The first column is always text.

    Raises:
        ValueError: a row whose number of cells differs from the number of columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {list(row)}")
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (columns, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    is_text = [i == 0 or column in text_columns for i, column in enumerate(columns)]
    rule = [
        "-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)
    ]
    aligned = [
        [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:]))


@dataclasses.dataclass(frozen=True)
class PaperNumbers:
    """The numbers of a table of the paper, and how to print them next to ours.

    Attributes:
        cells: value and mark by row name and metric.
        setting: model and data of the paper's numbers, for the notes.
        comparable: True if ours were trained like the paper's, on the same data.
        headlines: metrics whose value and gain in the paper are printed next to our gains.
        print_all: print all cells of the paper in a table of their own, including rows that we lack.
    """

    cells: Mapping[str, Mapping[str, Cell]]
    setting: str
    comparable: bool
    headlines: Sequence[str] = ("AP",)
    print_all: bool = False

    def marks(self, names: Iterable[str]) -> list[str]:
        """Returns the marks of all printed cells, for a table with the rows `names`."""
        if self.print_all:
            return [mark for cells in self.cells.values() for _, mark in cells.values()]
        rows = [self.cells.get(name, {}) for name in names]
        return [cells[metric][1] for cells in rows for metric in self.headlines if metric in cells]


def table1_markdown(
    rows: Sequence[Mapping],
    *,
    meta: Mapping[str, object],
    paper: Mapping[str, tuple[float, str]] = PAPER_TABLE1,
    comparable: bool = False,
) -> str:
    """Formats our rows of Table 1 and their gains over the baseline, next to the paper's AP and gain.

    Args:
        rows: see `paper_table_markdown`; names are those of `PAPER_TABLE1`.
        meta: see `paper_table_markdown`.
        paper: AP and mark by row name.
        comparable: True if ours were trained like the paper's, on the same data.

    Returns:
        Markdown that ends with a newline.

    Raises:
        ValueError: two rows have the same name.
    """
    cells = {name: {"AP": cell} for name, cell in paper.items()}
    numbers = PaperNumbers(cells, setting="VGG-16 Faster R-CNN on COCO", comparable=comparable)
    return paper_table_markdown(rows, numbers, meta=meta)


def paper_table_markdown(
    rows: Sequence[Mapping],
    paper: PaperNumbers,
    *,
    meta: Mapping[str, object],
    metrics: Sequence[str] = METRICS,
) -> str:
    """Formats our rows of a table of the paper, and their gains over the baseline next to the paper's gains.

    The baseline of a row is the row `baseline`, or `HEAD/baseline` for a row `HEAD/...`.

    Args:
        rows: each with `name` (unique), `loss`, `suppression`, `voting`, the metrics in per cent (None without ground
            truth), `steps`, `seed`, `seconds` and `versions` (package -> version). Missing entries are printed as "-".
            Without a baseline, gains are too.
        paper: the paper's numbers.
        meta: facts common to all rows (data, preset, device, ...), printed as `key: value` above the tables.
        metrics: our columns.

    Returns:
        Markdown that ends with a newline.

    Raises:
        ValueError: two rows have the same name.
    """
    by_name = {row["name"]: row for row in rows}
    if len(by_name) != len(rows):
        raise ValueError(f"row names must be unique, not {[row['name'] for row in rows]}")
    gains = []
    for name, row in by_name.items():
        baseline = by_name.get(_baseline_name(name), {})
        cells = [_gain(row.get(metric), baseline.get(metric)) for metric in metrics]
        gains.append([name, *cells, *paper_cells(name, paper.cells, paper.headlines)])
    paper_columns = [f"paper's {kind}{metric}" for metric in paper.headlines for kind in ("", "gain in ")]
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        "Average precision in per cent:",
        _our_table(rows, metrics),
        "Gain over the baseline in points, with the paper's gain:",
        markdown_table(["name", *metrics, *paper_columns], gains),
        *(["All of the paper's numbers:", _whole_paper(paper.cells)] if paper.print_all else []),
        _notes(paper.marks(by_name), setting=paper.setting, comparable=paper.comparable),
        _versions(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _our_table(rows: Sequence[Mapping], metrics: Sequence[str]) -> str:
    cells = [
        [str(row.get(key, _MISSING)) for key in LABELS]
        + [_number(row.get(metric), "{:.1f}") for metric in metrics]
        + [_number(row.get("steps"), "{:d}"), str(row.get("seed", _MISSING))]
        + [_number(row.get("seconds"), "{:.0f}")]
        for row in rows
    ]
    return markdown_table([*LABELS, *metrics, "steps", "seed", "seconds"], cells, text_columns=LABELS)


def marked(text: str, mark: str) -> str:
    """Returns a number of the paper with the mark of its source."""
    return f"({text}){_MARKS[mark]}" if mark == "unverified" else f"{text}{_MARKS[mark]}"


def meanings(marks: Sequence[str]) -> str:
    """Returns the meaning of each mark that occurs, one paragraph each; "" if all numbers were read."""
    return "\n\n".join(text for mark, text in _MEANINGS.items() if mark in marks)


def paper_cells(name: str, paper: Mapping[str, Mapping[str, Cell]], headlines: Sequence[str]) -> list[str]:
    """Returns the paper's value and gain of each metric; a gain has its less reliable mark."""
    order, cells = list(_MARKS), []
    for metric in headlines:
        value, mark = paper.get(name, {}).get(metric, (None, "read"))
        base, base_mark = paper.get(_baseline_name(name), {}).get(metric, (None, "read"))
        cells.append(_MISSING if value is None else marked(f"{value:.1f}", mark))
        gain = _gain(value, base)
        cells.append(gain if gain == _MISSING else marked(gain, max(mark, base_mark, key=order.index)))
    return cells


def _number(value: float | int | None, form: str) -> str:
    return _MISSING if value is None else form.format(value)


def _gain(value: float | int | None, base: float | int | None) -> str:
    if value is None or base is None:
        return _MISSING
    return f"{round(value - base, 1) + 0.0:+.1f}"  # adding 0.0 turns -0.0 into 0.0


def _baseline_name(name: str) -> str:
    head, slash, _ = name.rpartition("/")
    return f"{head}{slash}baseline"


def _whole_paper(paper: Mapping[str, Mapping[str, Cell]]) -> str:
    metrics = list(dict.fromkeys(metric for cells in paper.values() for metric in cells))
    rows = [
        [name, *(marked(f"{cells[m][0]:.1f}", cells[m][1]) if m in cells else _MISSING for m in metrics)]
        for name, cells in paper.items()
    ]
    return markdown_table(["name", *metrics], rows)


def _notes(marks: Sequence[str], *, setting: str, comparable: bool) -> str:
    if not marks:
        return ""
    note = f"The paper's numbers are {setting}."
    if not comparable:
        note += " Their levels are not comparable with ours, only the signs and the order of the gains."
    return "\n\n".join(filter(None, (note, meanings(marks))))


def _versions(rows: Sequence[Mapping]) -> str:
    """Returns a line for each set of versions; if there are several, each names its rows."""
    made: dict[str, list[str]] = {}
    for row in rows:
        if row.get("versions"):
            text = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
            made.setdefault(text, []).append(row["name"])
    return "\n\n".join(
        f"Versions: {text}." if len(made) == 1 else f"Versions of {', '.join(names)}: {text}."
        for text, names in made.items()
    )
