"""Markdown page of a run: every number, and what is needed to repeat them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.accelerator.goals import Goal, product_share
from benchmarks.accelerator.outcomes import MEASURED
from benchmarks.accelerator.plan import PEER, Cell
from klbox_jax.report.tables import markdown_table

Outcomes = Mapping[str, Mapping[str, Any]]
STEP_COLUMNS = (
    "step",
    "precision",
    "batch",
    "images/s",
    "ms",
    "memory, GiB",
    "compilation, s",
    "useful TFLOP/s",
    "XLA's TFLOP",
    "of product rate",
)
MISSING = "-"


def page_markdown(
    *,
    cells: Sequence[Cell],
    outcomes: Outcomes,
    goals: Sequence[Goal],
    facts: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """Returns the page, which ends with a newline.

    Args:
        cells: of the run, in order.
        outcomes: of the cells, by name.
        goals: with their values.
        facts: printed as `key: value`.
        notes: sentences about the run as a whole.
    """
    by_kind = {kind: [cell for cell in cells if cell.kind == kind] for kind in {cell.kind for cell in cells}}

    def section(kind: str, write: Callable[[Sequence[Cell], Outcomes], str]) -> str:
        return write(by_kind.get(kind, ()), outcomes)

    parts = [
        "# Accelerator benchmark",
        "\n".join(f"- {key}: {_text(value)}" for key, value in facts.items()),
        *notes,
        "## Goals for one H200",
        _goals(goals),
        "## Correctness",
        "Difference from float32 on the device's CPU: losses and the gradient's norm relative to themselves, boxes in "
        "pixels (the better half of the detections, each with the closest one of its class).",
        section("correctness", _correctness),
        "## Training step",
        section("train", _steps),
        "## Eval step",
        section("inference", _steps),
        "## Post-processing alone",
        section("postprocess", _postprocess),
        section("nms", _nms),
        "## RoIAlign",
        section("roi_align", _pooling),
        "## Large matrix product",
        section("product", _products),
        "## Not measured",
        _not_measured(cells, outcomes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals(goals: Sequence[Goal]) -> str:
    marks = {True: "met", False: "missed", None: "not measured"}
    rows = [(goal.text, _number(goal.value, ".4g"), marks[goal.met]) for goal in goals]
    return markdown_table(("goal", "value", "result"), rows, text_columns=("result",))


def _correctness(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    rows, failures = [], []
    for cell in cells:
        outcome = outcomes[cell.name]
        if outcome["status"] != MEASURED:
            failures.append(f"- {cell.variant}: {outcome['reason']}")
            continue
        for precision, found in _records(outcome).items():
            errors, bounds = found["loss_errors"], found["bounds"]
            worst = None if None in errors.values() else max(errors.values())
            rows.append(
                (
                    cell.variant,
                    precision,
                    _number(worst, ".1e"),
                    f"{bounds['loss']:.0e}",
                    _number(found["box_error"], ".2g"),
                    f"{bounds['box_error']:g} for {bounds['box_quantile']:.0%}",
                    f"{_number(found['first_loss'], '.4g')} to {_number(found['last_loss'], '.4g')}",
                    "no" if found["failures"] else "yes",
                )
            )
            failures += [f"- {cell.variant} in {precision}: {sentence}" for sentence in found["failures"]]
    columns = (
        "network",
        "precision",
        "losses",
        "allowed",
        "boxes, px",
        "allowed",
        "loss of 20 steps",
        "passes",
    )
    table = markdown_table(columns, rows, text_columns=("precision", "passes"))
    return "\n\n".join(part for part in (table, "\n".join(failures)) if part)


def _steps(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    rows = [
        (
            f"{cell.side}, {cell.variant}" if cell.variant else cell.side,
            "autocast bfloat16" if cell.side == PEER and cell.precision == "bfloat16" else cell.precision,
            str(cell.batch),
            _number(outcome["images_per_second"], ".4g"),
            _number(1e3 * outcome["seconds"], ".4g"),
            _number(outcome["device_bytes"], ".2f", unit=2**30),
            _number(outcome.get("compile_seconds"), ".0f"),
            _number(outcome.get("flops"), ".4g", unit=1e12 * outcome["seconds"]),
            _number(outcome.get("xla_flops"), ".4g", unit=1e12),
            _number(product_share(outcomes, cell), ".0%"),
        )
        for cell in cells
        if (outcome := outcomes[cell.name])["status"] == MEASURED
    ]
    return markdown_table(STEP_COLUMNS, rows, text_columns=("precision",))


def _postprocess(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    rows = [
        (name, str(cell.batch), _number(1e3 * found["seconds"], ".4g"), _share(found, cell, outcomes))
        for cell in cells
        if outcomes[cell.name]["status"] == MEASURED
        for name, found in _records(outcomes[cell.name]).items()
    ]
    return markdown_table(("selection, decoding and", "batch", "ms", "of the eval step"), rows)


def _nms(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    rows = [
        (
            "hard NMS of the RPN",
            str(cell.batch),
            _number(1e3 * found["seconds"], ".4g"),
            _share(found, cell, outcomes),
        )
        for cell in cells
        if (found := outcomes[cell.name])["status"] == MEASURED
    ]
    return markdown_table(("operation", "batch", "ms", "of the eval step"), rows) if rows else ""


def _pooling(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    rows = [
        (
            cell.side,
            cell.precision,
            str(cell.batch),
            _number(1e3 * outcome["forward"]["seconds"], ".4g"),
            _number(1e3 * outcome["forward_backward"]["seconds"], ".4g"),
        )
        for cell in cells
        if (outcome := outcomes[cell.name])["status"] == MEASURED
    ]
    columns = ("side", "precision", "batch", "forward, ms", "forward and backward, ms")
    return markdown_table(columns, rows, text_columns=("precision",))


def _products(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    rows = [
        (cell.precision, str(outcome["side"]), _number(outcome["flops_per_second"], ".4g", unit=1e12))
        for cell in cells
        if (outcome := outcomes[cell.name])["status"] == MEASURED
    ]
    return markdown_table(("precision", "rows and columns", "TFLOP/s"), rows)


def _not_measured(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    lines = [
        f"- {cell.name}: {outcomes[cell.name]['status']}: {outcomes[cell.name]['reason']}"
        for cell in cells
        if outcomes[cell.name]["status"] != MEASURED
    ]
    return "\n".join(lines) or "Nothing: every measurement of the plan was made."


def _records(outcome: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parts of an outcome that has several."""
    return {name: value for name, value in outcome.items() if isinstance(value, Mapping)}


def _share(found: Mapping[str, Any], cell: Cell, outcomes: Outcomes) -> str:
    """The time of an operation over that of the eval step of its batch and precision."""
    step = outcomes.get(Cell(kind="inference", precision=cell.precision, batch=cell.batch).name, {})
    seconds = step.get("seconds")
    return _number(None if seconds is None else found["seconds"] / seconds, ".1%")


def _number(value: float | None, form: str, *, unit: float = 1.0) -> str:
    return MISSING if value is None else format(value / unit, form)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items()) or "none"
    return "unknown" if value is None else str(value)
