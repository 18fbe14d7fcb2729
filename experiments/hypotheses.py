"""Hypotheses about the paper's full row over the baseline, and the result of each.

A reading note on the paper (patrick-llgc/Learning-Deep-Learning) expects AP50 to barely move while AP80 and AP90 rise,
and scores to agree better with localization because the box predicts its sigma. The first part is tested with the
differences between the rows, the second with the rank correlation of a detection's score and its IoU.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.seeds import MEAN_AND_INTERVALS, Difference
from klbox_jax.evaluation.confidence import student_interval
from klbox_jax.report import columns
from klbox_jax.report.columns import Column, interval_text
from klbox_jax.report.tables import markdown_table

# Points by which a metric that barely moves may move.
BARELY = 1.0
BARELY_MOVES, RISES = f"barely moves, by {BARELY:g} at most", "rises"
HYPOTHESES = {"AP50": BARELY_MOVES, "AP80": RISES, "AP90": RISES}


def markdown(
    found: Sequence[Difference], correlations: Mapping[str, Sequence[float | None]], *, base: str
) -> str:
    """Returns both parts as tables.

    `found` are the differences between the full row and the baseline. `correlations` of score and IoU are by row and in
    the order of the seeds, None where there is none; those of `base` are compared with the others.
    """
    tested = [one for one in found if one.metric in HYPOTHESES]
    tested.sort(key=lambda one: list(HYPOTHESES).index(one.metric))
    difference_columns = (
        Column("hypothesis", lambda one: f"{one.metric} {HYPOTHESES[one.metric]}"),
        *MEAN_AND_INTERVALS,
        Column("holds", lambda one: holds(one, HYPOTHESES[one.metric]), is_text=True),
    )
    headings = ("name", "Spearman", f"less that of {base}", "over seeds")
    rows = [[name, *agreement(values, correlations[base])] for name, values in correlations.items()]
    return columns.page(
        f"Hypotheses about {tested[0].row} over {tested[0].base}, in points. A hypothesis holds (yes) if both "
        "intervals agree with it, and fails (no) if the mean does not:",
        columns.table(difference_columns, tested),
        "Spearman's rank correlation of score and IoU, over detections that find an object at IoU 0.5:",
        markdown_table(headings, rows, text_columns=headings[3:]),
    )


def holds(one: Difference, hypothesis: str) -> str:
    """Returns yes, no or unsure."""
    lowest, highest = (-BARELY, BARELY) if hypothesis == BARELY_MOVES else (0.0, np.inf)
    if all(lowest < low and high < highest for low, high in one.intervals()):
        return "yes"
    return "unsure" if lowest < one.mean < highest else "no"


def agreement(values: Sequence[float | None], base: Sequence[float | None]) -> list[str]:
    """Returns the mean over seeds, that of the differences to the base, and its interval, as text."""
    if None in (*values, *base):
        return [columns.MISSING] * 3
    gains = np.subtract(values, base)
    interval = interval_text(student_interval(gains.tolist()), "+.3f")
    return [f"{np.mean(values):.3f}", f"{gains.mean():+.3f}", interval]
