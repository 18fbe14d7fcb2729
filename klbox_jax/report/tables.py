"""Result tables in Markdown: any table, and those of the KL Loss paper with ours beside the paper's numbers."""

from collections.abc import Mapping, Sequence

from klbox_jax.report.paper import PAPER_TABLE1, Cell

METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")
LABELS = ("name", "loss", "suppression", "voting")

# How a number of the paper is known, from the surest on, and how it is marked.
_MARKS = {"read": "", "second-hand": "*", "derived": "~", "unverified": "?"}
_MEANINGS = {
    "second-hand": "`*` second-hand: quoted in another public report, not read in the paper.",
    "derived": "`~` derived: follows from other numbers, read or second-hand.",
    "unverified": "`( )?` unverified: remembered, checked against no text; not to be cited as the paper's.",
}
_MISSING = "-"


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[str] = ()
) -> str:
    """A Markdown table whose source is aligned too, without a line end after the last row.

    Args:
        columns: headings.
        rows: cells in the order of the headings.
        text_columns: headings of the columns that are aligned to the left; the others, and so numbers, go
            to the right. The first column is always text.

    Raises:
        ValueError: a row of another length.
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


def table1_markdown(
    rows: Sequence[Mapping],
    *,
    meta: Mapping[str, object],
    paper: Mapping[str, tuple[float, str]] = PAPER_TABLE1,
    comparable: bool = False,
) -> str:
    """Our rows of Table 1, then what each gains over the baseline, beside the paper's AP and gain.

    Args:
        rows: see `paper_table_markdown`; the names are those of `PAPER_TABLE1`.
        meta: see `paper_table_markdown`.
        paper: AP and mark by row name.
        comparable: ours are trained as the paper's, on the same data.

    Returns:
        Markdown that ends with a newline.

    Raises:
        ValueError: two rows of one name.
    """
    return paper_table_markdown(
        rows,
        meta=meta,
        paper={name: {"AP": cell} for name, cell in paper.items()},
        setting="VGG-16 Faster R-CNN on COCO",
        comparable=comparable,
    )


def paper_table_markdown(
    rows: Sequence[Mapping],
    *,
    meta: Mapping[str, object],
    paper: Mapping[str, Mapping[str, Cell]],
    setting: str,
    comparable: bool,
    metrics: Sequence[str] = METRICS,
    headlines: Sequence[str] = ("AP",),
    whole_paper: bool = False,
) -> str:
    """Our rows of a table of the paper, what each gains over its baseline beside the paper's gain, and its cells.

    The baseline of a row is the row `baseline`, or `HEAD/baseline` for a row `HEAD/...`.

    Args:
        rows: each with `name` (unique), `loss`, `suppression`, `voting`, the metrics in per cent (None where
            there is no ground truth), `steps`, `seed`, `seconds` and `versions` (package -> version). Missing
            entries print as "-". Without a baseline, gains do too.
        meta: what all rows share (data, preset, device, ...), printed as `key: value` above the tables.
        paper: value and mark by row name and metric.
        setting: what the paper's numbers were measured on, for the notes.
        comparable: ours are trained as the paper's, on the same data.
        metrics: columns of ours.
        headlines: metrics whose value and gain in the paper stand beside our gains.
        whole_paper: print all cells of the paper in a table of their own, those of rows that we lack included.

    Returns:
        Markdown that ends with a newline.

    Raises:
        ValueError: two rows of one name.
    """
    by_name = {row["name"]: row for row in rows}
    if len(by_name) != len(rows):
        raise ValueError(f"row names must be unique, not {[row['name'] for row in rows]}")
    ours = [
        [str(row.get(key, _MISSING)) for key in LABELS]
        + [_number(row.get(metric), "{:.1f}") for metric in metrics]
        + [_number(row.get("steps"), "{:d}"), str(row.get("seed", _MISSING))]
        + [_number(row.get("seconds"), "{:.0f}")]
        for row in rows
    ]
    gains = []
    for name, row in by_name.items():
        baseline = by_name.get(_baseline_name(name), {})
        cells = [_gain(row.get(metric), baseline.get(metric)) for metric in metrics]
        gains.append([name, *cells, *paper_cells(name, paper, headlines)])
    paper_columns = [f"paper's {kind}{metric}" for metric in headlines for kind in ("", "gain in ")]
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        "Average precision in per cent:",
        markdown_table([*LABELS, *metrics, "steps", "seed", "seconds"], ours, text_columns=LABELS),
        "Gain over the baseline in points, ours beside the paper's:",
        markdown_table(["name", *metrics, *paper_columns], gains),
    ]
    if whole_paper:
        parts += ["All of the paper's numbers:", _whole_paper(paper)]
        shown = [cell for cells in paper.values() for cell in cells.values()]
    else:
        shown = [paper[name][metric] for name in by_name for metric in headlines if _has(paper, name, metric)]
    parts += [_notes([mark for _, mark in shown], setting=setting, comparable=comparable), _versions(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def marked(text: str, mark: str) -> str:
    """A number of the paper with the mark of how it is known."""
    return f"({text}){_MARKS[mark]}" if mark == "unverified" else f"{text}{_MARKS[mark]}"


def meanings(marks: Sequence[str]) -> str:
    """What the marks mean, a paragraph for each that occurs; "" for numbers that were all read."""
    return "\n\n".join(text for mark, text in _MEANINGS.items() if mark in marks)


def paper_cells(name: str, paper: Mapping[str, Mapping[str, Cell]], headlines: Sequence[str]) -> list[str]:
    """The paper's number and its gain for each metric; a gain is as sure as the less sure of its two numbers."""
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


def _has(paper: Mapping[str, Mapping[str, Cell]], name: str, metric: str) -> bool:
    return metric in paper.get(name, {})


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
        note += " They are not comparable with ours in level, only in the sign and the order of the gains."
    return "\n\n".join(filter(None, (note, meanings(marks))))


def _versions(rows: Sequence[Mapping]) -> str:
    """One line for each set of versions, with the rows that it made where there are several sets."""
    made: dict[str, list[str]] = {}
    for row in rows:
        if row.get("versions"):
            text = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
            made.setdefault(text, []).append(row["name"])
    return "\n\n".join(
        f"Versions: {text}." if len(made) == 1 else f"Versions of {', '.join(names)}: {text}."
        for text, names in made.items()
    )
