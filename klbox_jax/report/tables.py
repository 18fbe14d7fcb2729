"""Result tables in Markdown: any table, and Table 1 of the KL Loss paper with ours beside the paper's."""

from collections.abc import Mapping, Sequence

METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")

# AP of Table 1 (KL Loss, He et al., CVPR 2019: VGG-16 Faster R-CNN on COCO) and how it is known. "read": in a
# public text of the authors; "second-hand": quoted in someone else's public report; "unverified": remembered.
PAPER_TABLE1 = {
    "baseline": (23.6, "read"),
    "soft_nms": (24.8, "unverified"),
    "kl": (26.4, "second-hand"),
    "kl_voting": (27.8, "unverified"),
    "kl_soft_nms": (27.8, "unverified"),
    "kl_voting_soft_nms": (29.1, "read"),
}
_MARKS = {"read": "", "second-hand": "*", "unverified": "?"}
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
) -> str:
    """Our rows of Table 1, then what each gains over the baseline, beside the paper's AP and gain.

    Args:
        rows: each with `name` (unique; the names of `PAPER_TABLE1`), `loss`, `suppression`, `voting`, AP to
            AP90 in per cent (None where there is no ground truth), `steps`, `seed`, `seconds` and `versions`
            (package -> version). Missing entries print as "-". Without a row `baseline`, gains do too.
        meta: what all rows share (data, preset, device, ...), printed as `key: value` above the tables.
        paper: AP and mark ("read", "second-hand" or "unverified") by row name.

    Returns:
        Markdown that ends with a newline.

    Raises:
        ValueError: two rows of one name.
    """
    names = [row["name"] for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"row names must be unique, not {names}")
    baseline = next((row for row in rows if row["name"] == "baseline"), {})

    settings = ["name", "loss", "suppression", "voting"]
    ours = [
        [str(row.get(key, _MISSING)) for key in settings]
        + [_number(row.get(metric), "{:.1f}") for metric in METRICS]
        + [_number(row.get("steps"), "{:d}"), str(row.get("seed", _MISSING))]
        + [_number(row.get("seconds"), "{:.0f}")]
        for row in rows
    ]
    gains = [
        [row["name"]]
        + [_gain(row.get(metric), baseline.get(metric)) for metric in METRICS]
        + _paper_cells(row["name"], paper)
        for row in rows
    ]
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        "Average precision in per cent:",
        markdown_table([*settings, *METRICS, "steps", "seed", "seconds"], ours, text_columns=settings),
        "Gain over the baseline in points, ours beside the paper's:",
        markdown_table(["name", *METRICS, "paper's AP", "paper's gain in AP"], gains),
        _notes([paper[name][1] for name in names if name in paper]),
        _versions(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _number(value: float | int | None, form: str) -> str:
    return _MISSING if value is None else form.format(value)


def _gain(value: float | int | None, base: float | int | None) -> str:
    if value is None or base is None:
        return _MISSING
    return f"{round(value - base, 1) + 0.0:+.1f}"  # adding 0.0 turns -0.0 into 0.0


def _paper_cells(name: str, paper: Mapping[str, tuple[float, str]]) -> list[str]:
    """The paper's AP and its gain; a gain is as sure as the less sure of its two numbers."""
    if name not in paper:
        return [_MISSING, _MISSING]
    value, mark = paper[name]
    cells = [_marked(f"{value:.1f}", mark)]
    if "baseline" not in paper:
        return [*cells, _MISSING]
    base, base_mark = paper["baseline"]
    order = list(_MARKS)
    return [*cells, _marked(_gain(value, base), max(mark, base_mark, key=order.index))]


def _marked(text: str, mark: str) -> str:
    return f"({text}){_MARKS[mark]}" if mark == "unverified" else f"{text}{_MARKS[mark]}"


def _notes(marks: Sequence[str]) -> str:
    if not marks:
        return ""
    lines = [
        "The paper's numbers are VGG-16 Faster R-CNN on COCO. They are not comparable with ours in level, "
        "only in the sign and the order of the gains."
    ]
    if "second-hand" in marks:
        lines.append("`*` second-hand: quoted in another public report, not read in the paper.")
    if "unverified" in marks:
        lines.append(
            "`( )?` unverified: remembered, checked against no text; not to be cited as the paper's."
        )
    return "\n\n".join(lines)


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
