"""Tables of the report page about errors by class: TIDE's error types and confusions between classes."""

from collections.abc import Sequence
from html import escape

import numpy as np

from klbox_jax.evaluation.tide import ERROR_TYPES
from klbox_jax.report.page_accuracy import ClassAccuracy
from klbox_jax.report.page_data import Run
from klbox_jax.report.page_tables import MISSING, html_table, term_link

_MAX_MATRIX_CLASSES = 20
_MAX_CONFUSIONS = 20
_NUM_SHADES = 5


def error_tables(runs: Sequence[Run], accuracies: Sequence[ClassAccuracy]) -> str:
    """Returns a table of error types and one of confusions for each run."""
    parts = []
    for run, accuracy in zip(runs, accuracies, strict=True):
        of_run = f", {escape(run.label)}" if len(runs) > 1 else ""
        parts.append(
            f"<h3>{term_link('tide', 'Error types')}{of_run}</h3>{_error_types(accuracy, run.label)}"
        )
        parts.append(
            f"<h3>{term_link('confusion', 'Confusions')}{of_run}</h3>{_confusions(accuracy, run.label)}"
        )
    return "".join(f"<div>{parts[i]}</div><div>{parts[i + 1]}</div>" for i in range(0, len(parts), 2))


def _error_types(accuracy: ClassAccuracy, label: str) -> str:
    errors = accuracy.errors
    if errors is None:
        return "<p>Error types need hotcoco: pip install 'klbox-jax[fast]', then write the report again.</p>"
    named = {"all classes": errors, **errors["by_class"]}
    # FP and FN contain the other types, so they are not shaded with them.
    largest = max(
        (row[name] for row in named.values() if row for name in ERROR_TYPES[:6] if name in row), default=0.0
    )
    rows = [
        [escape(name)]
        + [MISSING if row is None else f"{row['AP']:.1f}"]
        + [_error_cell(row, kind, largest if kind in ERROR_TYPES[:6] else 0.0) for kind in ERROR_TYPES]
        for name, row in named.items()
    ]
    head = [
        "class",
        term_link("ap-iou", "AP50"),
        *(term_link(f"tide-{name.lower()}", name) for name in ERROR_TYPES),
    ]
    return (
        "<p>Gain in AP50, in points, if all errors of a type were fixed. A class is evaluated alone: its detections "
        "on objects of other classes count as Bkg.</p>"
        + html_table(head, rows, name=f"Error types of {label}", css="numbers shaded")
    )


def _error_cell(row: dict | None, kind: str, largest: float) -> str:
    if row is None or kind not in row:
        return MISSING
    return shaded(f"{row[kind]:.1f}", row[kind], largest)


def shaded(text: str, value: float | np.integer, largest: float | np.integer) -> str:
    """Returns the text of a cell with a shade by its share of the largest value."""
    shade = int(np.ceil(_NUM_SHADES * value / largest)) if largest > 0 and value > 0 else 0
    return f'<span class="shade{min(shade, _NUM_SHADES)}">{text}</span>'


def _confusions(accuracy: ClassAccuracy, label: str) -> str:
    counts, names = accuracy.confusion, [*accuracy.class_names, "background"]
    note = (
        "<p>Numbers of pairs of a true class (row) and a predicted class (column) at IoU 0.5, from detections with a "
        "score of at least 0.5. The column background counts missed objects, the row background detections without "
        "an object.</p>"
    )
    name = f"Confusions of {label}"
    if len(accuracy.class_names) <= _MAX_MATRIX_CLASSES:
        wrong = counts * ~np.eye(len(counts), dtype=bool)
        rows = [
            [
                escape(names[i]),
                *(shaded(str(counts[i, j]), wrong[i, j], wrong.max()) for j in range(len(names))),
            ]
            for i in range(len(names))
        ]
        return note + html_table(["true class", *map(escape, names)], rows, name=name, css="numbers shaded")
    inner = counts[:-1, :-1] * ~np.eye(len(counts) - 1, dtype=bool)
    order = np.argsort(-inner, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [divmod(int(place), len(inner)) for place in order if inner.flat[place] > 0]
    if not pairs:
        return "<p>No object was detected as another class with a score of at least 0.5.</p>"
    rows = [[escape(names[i]), escape(names[j]), str(inner[i, j])] for i, j in pairs]
    return (
        "<p>Most frequent confusions at IoU 0.5, from detections with a score of at least 0.5.</p>"
        + html_table(
            ["true class", "detected as", "number"], rows, name=name, css="numbers", text_columns=(1,)
        )
    )
