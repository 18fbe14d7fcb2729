"""Tables of the report page as HTML: facts about the runs, their metrics and their configs."""

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from klbox_jax.report.glossary import GLOSSARY
from klbox_jax.report.page_data import Run, flat

MISSING = "-"
# Rows of each table: dotted key in metrics.json, name, format, factor, and entry of the glossary.
_METRICS = {
    "Accuracy": (
        ("AP", "AP", ".1f", 1, "ap"),
        ("AP50", "AP50", ".1f", 1, "ap-iou"),
        ("AP60", "AP60", ".1f", 1, "ap-iou"),
        ("AP70", "AP70", ".1f", 1, "ap-iou"),
        ("AP75", "AP75", ".1f", 1, "ap-iou"),
        ("AP80", "AP80", ".1f", 1, "ap-iou"),
        ("AP90", "AP90", ".1f", 1, "ap-iou"),
        ("AP_small", "AP small", ".1f", 1, "ap-size"),
        ("AP_medium", "AP medium", ".1f", 1, "ap-size"),
        ("AP_large", "AP large", ".1f", 1, "ap-size"),
        ("AR100", "AR100", ".1f", 1, "ar"),
        ("mask_AP", "mask AP", ".1f", 1, "mask-ap"),
        ("AP_voc", "AP of VOC 2007", ".1f", 1, "ap-voc"),
    ),
    "Uncertainty": (
        ("num_objects", "objects", "d", 1, "objects"),
        ("num_matched", "objects found", "d", 1, "objects"),
        ("RMSE", "RMSE of an edge (px)", ".2f", 1, "rmse"),
        ("sharpness", "mean sigma (px)", ".2f", 1, "sharpness"),
        ("NLL", "NLL of an edge", ".3f", 1, "nll"),
        ("energy_score", "energy score (px)", ".2f", 1, "energy-score"),
        ("coverage_1sigma", "coverage at 1 sigma (68.3)", ".1f", 100, "coverage"),
        ("coverage_2sigma", "coverage at 2 sigma (95.4)", ".1f", 100, "coverage"),
        ("coverage_3sigma", "coverage at 3 sigma (99.7)", ".1f", 100, "coverage"),
        ("calibration.ECE", "ECE", ".3f", 1, "ece"),
        ("ENCE", "ENCE", ".3f", 1, "ence"),
        ("AUSE", "AUSE", ".3f", 1, "ause"),
        ("spearman_sigma_error", "Spearman of sigma and error", ".3f", 1, "spearman"),
    ),
    "Errors and boxes": (
        ("LRP.oLRP", "optimal LRP", ".1f", 1, "lrp"),
        ("LRP.oLRP_localization", "LRP of localization", ".1f", 1, "lrp-parts"),
        ("LRP.oLRP_false_positive", "LRP of false positives", ".1f", 1, "lrp-parts"),
        ("LRP.oLRP_false_negative", "LRP of missed objects", ".1f", 1, "lrp-parts"),
        ("PDQ.PDQ", "PDQ", ".1f", 1, "pdq"),
        ("PDQ.spatial_quality", "spatial quality", ".1f", 1, "pdq-parts"),
        ("PDQ.label_quality", "label quality", ".1f", 1, "pdq-parts"),
    ),
}
# Tables with a prefix of their keys; rows without any value are left out of the last two, and of these keys.
_TABLES = (
    ("Accuracy", "", _METRICS["Accuracy"]),
    ("Uncertainty", "uncertainty.", _METRICS["Uncertainty"]),
    ("Uncertainty after calibration", "uncertainty_calibrated.", _METRICS["Uncertainty"][3:]),
    ("Errors and boxes", "", _METRICS["Errors and boxes"]),
)
_OPTIONAL = {"mask_AP", "AP_voc", "uncertainty.energy_score"}
_MAX_OPEN_CLASSES = 15
# Columns of the table of evaluations: heading, dotted key, format and factor.
_EVALUATION_COLUMNS = (
    ("AP", "AP", ".1f", 1),
    ("AP50", "AP50", ".1f", 1),
    ("AP75", "AP75", ".1f", 1),
    ("AP90", "AP90", ".1f", 1),
    ("NLL", "uncertainty.NLL", ".3f", 1),
    ("coverage at 1 sigma", "uncertainty.coverage_1sigma", ".1f", 100),
)


def facts_table(runs: Sequence[Run]) -> str:
    """Returns facts about the runs: a list for one run, a table with a column for each run otherwise."""
    facts: dict[str, Callable[[Run], Any]] = {
        "Step": lambda run: run.step,
        "Post-processing": lambda run: run.setting or "the config's",
        "Seed": lambda run: run.metrics.get("seed", MISSING),
        "Data": lambda run: run.metrics.get("data", MISSING),
        "Box loss": lambda run: run.config.get("model", {}).get("box_loss", MISSING),
        "Versions": lambda run: ", ".join(
            f"{name} {json.dumps(value) if isinstance(value, dict) else value}"
            for name, value in run.versions.items()
        ),
    }
    if len(runs) == 1:
        entries = "".join(
            f"<div><dt>{name}</dt><dd>{escape(str(fact(runs[0])))}</dd></div>" for name, fact in facts.items()
        )
        return f'<dl class="facts">{entries}</dl>'
    rows = []
    for name, fact in facts.items():
        values = [escape(str(fact(run))) for run in runs]
        rows.append([name, values[0]] if len(set(values)) == 1 else [name, *values])
    head = "".join(f"<td><strong>{escape(run.label)}</strong></td>" for run in runs)
    lines = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td{_span(values, runs)}>{value}</td>" for value in values)
        + "</tr>"
        for name, *values in rows
    )
    return (
        '<div class="wide" role="region" tabindex="0" aria-label="Run"><table class="facts">'
        f'<tr><th scope="row">Run</th>{head}</tr>{lines}</table></div>'
    )


def _span(values: Sequence[str], runs: Sequence[Run]) -> str:
    return f' colspan="{len(runs)}"' if len(values) < len(runs) else ""


def number_tables(runs: Sequence[Run]) -> str:
    """Returns tables of metrics, one column for each run, and one for the difference if there are two."""
    head = [escape(run.label) for run in runs] + (["difference"] if len(runs) == 2 else [])
    tables = []
    for name, prefix, metrics in _TABLES:
        rows, has_values = [], False
        for key, label, form, factor, term in metrics:
            values = [number_at(run.metrics, prefix + key) for run in runs]
            is_known = any(value is not None for value in values)
            has_values |= is_known
            if is_known or prefix + key not in _OPTIONAL:
                rows.append([term_link(term, label), *_cells(values, form, factor)])
        if has_values or name in ("Accuracy", "Uncertainty"):
            tables.append(html_table([name, *head], rows, name=name, css="numbers"))
    classes = list(dict.fromkeys(name for run in runs for name in run.metrics.get("AP_by_class", {})))
    by_class = [
        [escape(name), *_cells([run.metrics.get("AP_by_class", {}).get(name) for run in runs], ".1f", 1)]
        for name in classes
    ]
    table = html_table(["AP by class", *head], by_class, name="AP by class", css="numbers")
    folded = ""
    if len(classes) <= _MAX_OPEN_CLASSES:
        tables.append(table)
    else:
        folded = f"<details><summary>AP of {len(classes)} classes</summary>{table}</details>"
    order = " The difference is the second run minus the first." if len(runs) == 2 else ""
    return (
        "<p>AP, AR, LRP, PDQ and coverage are in per cent; the coverage of a calibrated Gaussian is in parentheses. "
        "Uncertainty is measured on the true positives. An arrow shows the better direction, and each name leads "
        f"to its definition.{order}</p><div class='tables{' two' if len(runs) > 1 else ''}'>{''.join(tables)}</div>"
        f"{folded}{_evaluations(runs)}"
    )


def _evaluations(runs: Sequence[Run]) -> str:
    """Returns a folded table of all evaluations of the runs; "" if there are no others than those shown."""
    rows = [
        [
            escape(f"{run.label}, step {step}{f', {setting}' if setting else ''}"),
            escape(str(metrics.get("data", MISSING))),
            *(_cell(number_at(metrics, key), form, factor) for _, key, form, factor in _EVALUATION_COLUMNS),
        ]
        for run in _of_distinct_paths(runs)
        for (step, setting), metrics in run.evaluations.items()
    ]
    if len(rows) <= len(runs):
        return ""
    head = ["evaluation", "data", *(heading for heading, *_ in _EVALUATION_COLUMNS)]
    table = html_table(head, rows, name="All evaluations", css="numbers", text_columns=(1,))
    return f"<details><summary>All {len(rows)} evaluations</summary>{table}</details>"


def _of_distinct_paths(runs: Sequence[Run]) -> list[Run]:
    return list({run.path: run for run in reversed(runs)}.values())[::-1]


def number_at(numbers: Any, key: str) -> Any:
    """Returns the value of a dotted key in a nested dictionary, or None."""
    for part in key.split("."):
        numbers = numbers.get(part) if isinstance(numbers, dict) else None
    return numbers


def term_link(term: str, label: str) -> str:
    """Returns a measure's name as a link to its entry in the glossary."""
    better = GLOSSARY[term].better
    arrow = f' data-better="{better}"' if better else ""
    return f'<a class="term" href="#about-{term}"{arrow}>{escape(label)}</a>'


def _cell(value: float | int | None, form: str, factor: int) -> str:
    return MISSING if value is None else format(value * factor, form)


def _cells(values: Sequence[float | int | None], form: str, factor: int) -> list[str]:
    cells = [_cell(value, form, factor) for value in values]
    if len(values) == 2:
        cells.append(MISSING if None in values else _difference(values, form, factor))
    return cells


def _difference(values: Sequence[float | int], form: str, factor: int) -> str:
    text = format((values[1] - values[0]) * factor, f"+{form}")
    return text.replace("-", "+") if float(text) == 0 else text  # no -0.0


def config_table(runs: Sequence[Run]) -> str:
    """Returns a folded table of all config fields; `page.js` filters it."""
    found = [flat(run.config) for run in runs]
    names = sorted({name for one in found for name in one})
    head = "".join(f'<th scope="col">{escape(run.label)}</th>' for run in runs)
    lines = []
    for name in names:
        values = [one.get(name, MISSING) for one in found]
        differs = len(set(values)) > 1
        cells = "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
        mark = " <strong>differs</strong>" if differs else ""
        lines.append(
            f'<tr{" class=differs" if differs else ""}><th scope="row"><code>{escape(name)}</code>{mark}</th>'
            f"{cells}</tr>"
        )
    only = (
        '<span class="check"><input type="checkbox" id="only-differences">'
        '<label for="only-differences">only differences</label></span>'
    )
    return f"""<details><summary>{len(names)} fields</summary>
<form><div class="control"><label for="config-filter">Show fields with</label>
<input type="search" id="config-filter" autocomplete="off"></div>
{only if len(runs) > 1 else ""}<output id="config-count" for="config-filter" aria-live="polite"></output></form>
<div class="wide" role="region" tabindex="0" aria-label="Config"><table id="config-table">
<thead><tr><th scope="col">field</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></details>"""


def html_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    name: str,
    css: str = "",
    text_columns: Sequence[int] = (),
) -> str:
    """Returns a table of HTML cells; the first cell of a row is its heading.

    Args:
        head: headings of the columns, as HTML.
        rows: cells in the order of the headings, as HTML.
        name: accessible name of the table.
        css: class of the table.
        text_columns: positions of columns with text, which are aligned to the left.
    """
    kinds = ['class="text"' if i in text_columns else "" for i in range(len(head))]
    top = "".join(f'<th scope="col" {kind}>{cell}</th>' for kind, cell in zip(kinds, head, strict=True))
    lines = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td {kind}>{cell}</td>" for kind, cell in zip(kinds[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in rows
    )
    # Wide tables scroll; with a tabindex they can be scrolled by keyboard.
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table class="{css}">'
        f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
