"""The result of every measure, as records and as a table."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.speed.measure import Measure
from klbox_jax.evaluation.confidence import ratio_interval, ratio_of_medians
from klbox_jax.report import columns
from klbox_jax.report.columns import Column, interval_text, number, text

NOTES = """Medians of runs in turn. The ratio is ours over the other side's, so less is better; its interval is a
bootstrap over the pairs. FAIL: the ratio is above its limit. PASS: it is not. GOAL: it also reaches the goal."""


def record(measure: Measure, ours: Sequence[float], peer: Sequence[float]) -> dict:
    """Returns the entry of speed.json for a measure.

    Raises ValueError if the ratio is not a positive finite number.
    """
    ratio = ratio_of_medians(ours, peer)
    if not (np.isfinite(ratio) and ratio > 0):
        raise ValueError(f"{measure.name} has the ratio {ratio}, of {ours} over {peer}; it must be positive")
    return {key: getattr(measure, key) for key in ("name", "against", "must", "goal", "unit")} | {
        "ours": float(np.median(ours)),
        "peer": float(np.median(peer)),
        "ratio": ratio,
        "interval": list(ratio_interval(ours, peer)),
        "pairs": len(ours),
        "mark": "FAIL" if ratio > measure.must else "GOAL" if ratio <= measure.goal else "PASS",
    }


def records_table(records: Sequence[Mapping]) -> str:
    """Returns the table of the records."""
    table_columns = (
        text("name", "measure"),
        Column("ours", lambda e: quantity(e["ours"], e["unit"])),
        Column("against", lambda e: f"{quantity(e['peer'], e['unit'])}, {e['against']}", is_text=True),
        number("ratio", ".4g"),
        Column("95 % of it", lambda e: interval_text(e["interval"], ".4g")),
        *(number("must", ".4g"), number("goal", ".4g"), number("pairs", "d"), text("mark")),
    )
    return columns.table(table_columns, records)


def quantity(value: float, unit: str) -> str:
    """Returns a value in its unit with a prefix that suits its size."""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    if unit == "FLOP":
        return f"{value / 1e9:.2f} GFLOP"
    return f"{value:.4g} {unit}"
