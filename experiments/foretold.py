"""What was foretold of the paper's full row over the baseline, and whether it came true.

Foretold: "AP50 barely moves while AP80 and AP90 rise; scores and localization agree better once the box knows its
sigma." The first part is asked of the differences between the rows, the second of the rank correlation of a detection's
score with its IoU.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments import seeds
from klbox_jax.report.tables import markdown_table

# Points that a metric may move by, and barely move.
BARELY = 1.0
BARELY_MOVES, RISES = f"barely moves, by {BARELY:g} at most", "rises"
FORETOLD = {"AP50": BARELY_MOVES, "AP80": RISES, "AP90": RISES}


def markdown(
    found: Sequence[seeds.Difference], correlations: Mapping[str, Sequence[float | None]], *, base: str
) -> str:
    """Returns both parts as tables.

    Args:
        found: the differences between the full row and the baseline, with the metrics of `FORETOLD` among them.
        correlations: of score and IoU, by row and in the order of the seeds; None where there is none.
        base: the row of `correlations` that the others are held against.
    """
    by_metric = {one.metric: one for one in found}
    first = by_metric["AP50"]
    parts = [
        f"Foretold of {first.row} over {first.base}, in points. Came true: yes, if both intervals lie where they "
        "should; no, if the mean does not:",
        markdown_table(
            ("foretold", "mean", "over seeds", "over images", "came true"),
            [
                [
                    f"{metric} {what}",
                    f"{by_metric[metric].mean:+.2f}",
                    seeds.interval_text(by_metric[metric].seeds),
                    seeds.interval_text(by_metric[metric].images),
                    came_true(by_metric[metric], what),
                ]
                for metric, what in FORETOLD.items()
            ],
            text_columns=("over seeds", "over images", "came true"),
        ),
        "Spearman's rank correlation of score and IoU, over detections that find an object at IoU 0.5:",
        markdown_table(
            ("name", "Spearman", f"less that of {base}", "over seeds"),
            [[name, *agreement(values, correlations[base])] for name, values in correlations.items()],
            text_columns=("over seeds",),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def came_true(one: seeds.Difference, what: str) -> str:
    """Returns yes, no or unsure."""
    lowest, highest = (-BARELY, BARELY) if what == BARELY_MOVES else (0.0, np.inf)
    intervals = [bounds for bounds in (one.seeds, one.images) if bounds is not None]
    if all(lowest < low and high < highest for low, high in intervals):
        return "yes"
    return "unsure" if lowest < one.mean < highest else "no"


def agreement(values: Sequence[float | None], base: Sequence[float | None]) -> list[str]:
    """Returns the mean over seeds, that of the differences to the base, and its interval."""
    if None in (*values, *base):
        return ["-", "-", "-"]
    gains = np.subtract(values, base)
    bounds = seeds.student_interval(gains.tolist())
    interval = "-" if bounds is None else f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
    return [f"{np.mean(values):.3f}", f"{gains.mean():+.3f}", interval]
