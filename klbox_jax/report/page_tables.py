"""Tables of the report page as HTML: facts about the runs, their metrics and their configs."""

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from klbox_jax.report.page_data import Run, flat

_NONE = "-"
# Rows of each table: dotted key in metrics.json, name, format, and factor.
_METRICS = {
    "Accuracy": (
        ("AP", "AP", ".1f", 1),
        ("AP50", "AP50", ".1f", 1),
        ("AP60", "AP60", ".1f", 1),
        ("AP70", "AP70", ".1f", 1),
        ("AP75", "AP75", ".1f", 1),
        ("AP80", "AP80", ".1f", 1),
        ("AP90", "AP90", ".1f", 1),
        ("AP_small", "AP small", ".1f", 1),
        ("AP_medium", "AP medium", ".1f", 1),
        ("AP_large", "AP large", ".1f", 1),
        ("AR100", "AR100", ".1f", 1),
        ("mask_AP", "mask AP", ".1f", 1),
        ("AP_voc", "AP of VOC 2007", ".1f", 1),
    ),
    "Uncertainty": (
        ("uncertainty.num_objects", "objects", "d", 1),
        ("uncertainty.num_matched", "objects found", "d", 1),
        ("uncertainty.RMSE", "RMSE of an edge (px)", ".2f", 1),
        ("uncertainty.sharpness", "mean sigma (px)", ".2f", 1),
        ("uncertainty.NLL", "NLL of an edge", ".3f", 1),
        ("uncertainty.coverage_1sigma", "coverage at 1 sigma (68.3)", ".1f", 100),
        ("uncertainty.coverage_2sigma", "coverage at 2 sigma (95.4)", ".1f", 100),
        ("uncertainty.coverage_3sigma", "coverage at 3 sigma (99.7)", ".1f", 100),
        ("uncertainty.calibration.ECE", "ECE", ".3f", 1),
        ("uncertainty.ENCE", "ENCE", ".3f", 1),
        ("uncertainty.AUSE", "AUSE", ".3f", 1),
        ("uncertainty.spearman_sigma_error", "Spearman of sigma and error", ".3f", 1),
    ),
}
_OPTIONAL = {"mask_AP", "AP_voc"}


def facts_table(runs: Sequence[Run]) -> str:
    """Returns a table of facts about the runs, one column for each run."""
    facts: dict[str, Callable[[Run], Any]] = {
        "Step": lambda run: run.step,
        "Post-processing": lambda run: run.setting or "the config's",
        "Seed": lambda run: run.metrics.get("seed", _NONE),
        "Data": lambda run: run.metrics.get("data", _NONE),
        "Box loss": lambda run: run.config.get("model", {}).get("box_loss", _NONE),
        "Versions": lambda run: ", ".join(
            f"{name} {json.dumps(value) if isinstance(value, dict) else value}"
            for name, value in run.versions.items()
        ),
    }
    rows = []
    for name, fact in facts.items():
        values = [escape(str(fact(run))) for run in runs]
        rows.append([name, values[0]] if len(set(values)) == 1 and len(runs) > 1 else [name, *values])
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
    classes = list(dict.fromkeys(name for run in runs for name in run.metrics.get("AP_by_class", {})))
    by_class = [
        [escape(name), *_cells([run.metrics.get("AP_by_class", {}).get(name) for run in runs], ".1f", 1)]
        for name in classes
    ]
    head = [escape(run.label) for run in runs] + (["difference"] if len(runs) == 2 else [])
    tables = []
    for name, metrics in _METRICS.items():
        rows = []
        for key, label, form, factor in metrics:
            values = [number_at(run.metrics, key) for run in runs]
            if key not in _OPTIONAL or any(value is not None for value in values):
                rows.append([label, *_cells(values, form, factor)])
        tables.append(_table([name, *head], rows, name=name, attributes=' class="numbers"'))
    order = " The difference is the second run minus the first." if len(runs) == 2 else ""
    return (
        "<p>AP, AR and coverage are in per cent; the coverage of a calibrated Gaussian is in parentheses. "
        f"Uncertainty is measured on the true positives.{order}</p><div class='tables'>{''.join(tables)}</div>"
        f"<details><summary>AP of {len(classes)} classes</summary>"
        + _table(["class", *head], by_class, name="AP by class", attributes=' class="numbers"')
        + "</details>"
    )


def number_at(numbers: Any, key: str) -> Any:
    """Returns the value of a dotted key in a nested dictionary, or None."""
    for part in key.split("."):
        numbers = numbers.get(part) if isinstance(numbers, dict) else None
    return numbers


def _cells(values: Sequence[float | int | None], form: str, factor: int) -> list[str]:
    scaled = [None if value is None else value * factor for value in values]
    cells = [_NONE if value is None else format(value, form) for value in scaled]
    if len(scaled) == 2:
        known = None not in scaled
        # Adding 0 turns a rounded -0.0 into 0.0.
        difference = round(scaled[1] - scaled[0], 6) + 0 if known else None
        cells.append(_NONE if difference is None else format(difference, f"+{form}"))
    return cells


def config_table(runs: Sequence[Run]) -> str:
    """Returns a folded table of all config fields; `page.js` filters it."""
    found = [flat(run.config) for run in runs]
    names = sorted({name for one in found for name in one})
    head = "".join(f'<th scope="col">{escape(run.label)}</th>' for run in runs)
    lines = []
    for name in names:
        values = [one.get(name, _NONE) for one in found]
        differs = len(set(values)) > 1
        cells = "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
        mark = " <strong>differs</strong>" if differs else ""
        lines.append(
            f'<tr{" class=differs" if differs else ""}><th scope="row"><code>{escape(name)}</code>{mark}</th>'
            f"{cells}</tr>"
        )
    only = '<label class="check"><input type="checkbox" id="only-differences"> only differences</label>'
    return f"""<details><summary>{len(names)} fields</summary>
<form><label>Show fields with <input type="search" id="config-filter" autocomplete="off"></label>
{only if len(runs) > 1 else ""}<output id="config-count" aria-live="polite"></output></form>
<div class="wide" role="region" tabindex="0" aria-label="Config"><table id="config-table">
<thead><tr><th scope="col">field</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></details>"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, name: str, attributes: str = "") -> str:
    """Returns a table of HTML cells; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    # Wide tables scroll; with a tabindex they can be scrolled by keyboard.
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table{attributes}>'
        f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
