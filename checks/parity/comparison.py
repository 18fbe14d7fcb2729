"""Comparisons of two tensors, and the table of many."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RELATIVE = 1e-4
# Differences below this norm do not count: some gradients are zero.
ABSOLUTE = 1e-8
# Rows of the table that compare numbers instead of tensors.
NUMBERS = ("settings", "parameters")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two tensors that were compared."""

    group: str  # row of the table
    name: str  # of the tensor
    error: float  # relative
    tolerance: float = RELATIVE  # of the error

    @property
    def passed(self) -> bool:
        """True if the error is within its tolerance; a NaN is not."""
        return bool(self.error <= self.tolerance)


def largest(group: str, name: str, ours: Any, theirs: Any) -> Comparison:
    """Compares by the largest difference over the largest value; different shapes have an infinite error."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return Comparison(group, f"{name} {ours.shape} {theirs.shape}", float("inf"))
    difference = np.abs(ours - theirs).max(initial=0.0)
    return Comparison(group, name, float(difference / max(np.abs(theirs).max(initial=0.0), ABSOLUTE)))


def gradient(name: str, ours: Any, theirs: Any) -> Comparison:
    """Compares by the norm of the difference: `|a - b| <= RELATIVE |b| + ABSOLUTE`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = max(np.linalg.norm(ours - theirs) - ABSOLUTE, 0.0)
    return Comparison("gradients", name, float(difference / max(np.linalg.norm(theirs), ABSOLUTE)))


def table(comparisons: Mapping[str, Sequence[Comparison]]) -> str:
    """Returns one line for each stage of each model."""
    lines = [f"{'model':26}{'stage':14}{'number':>8}{'worst':>11}{'allowed':>10}"]
    for model, rows in comparisons.items():
        for group in dict.fromkeys(row.group for row in rows):
            members = [row for row in rows if row.group == group]
            worst = max(members, key=lambda row: row.error / row.tolerance)
            line = f"{model:26}{group:14}{len(members):8}{worst.error:11.1e}{worst.tolerance:10.0e}"
            lines.append(line if all(row.passed for row in members) else f"{line}  FAILED: {worst.name}")
    return "\n".join(lines)


def summary(comparisons: Mapping[str, Sequence[Comparison]], versions: dict[str, str]) -> dict[str, object]:
    """Returns the content of parity.json, in which an error that is not finite is None."""
    rows = [(model, row) for model, group in comparisons.items() for row in group]

    def worst(is_end_to_end):
        errors = [row.error for _, row in rows if (row.group == "end to end") == is_end_to_end]
        return _finite(max(errors, default=0.0))

    return {
        "compared": sum(row.group not in NUMBERS for _, row in rows),
        "worst_relative": worst(False),
        "worst_unmatched": worst(True),
        "failures": [
            {"model": model, "stage": row.group, "name": row.name, "error": _finite(row.error)}
            for model, row in rows
            if not row.passed
        ],
        "versions": versions,
    }


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
