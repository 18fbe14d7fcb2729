"""Curves for a report: average precision over IoU, and losses over training."""

import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours on white: black for the baseline, and no yellow.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
IOU_THRESHOLDS = tuple((50 + 5 * i) / 100 for i in range(10))


def plot_ap_over_iou(rows: Sequence[Mapping], path: str | os.PathLike, *, title: str) -> None:
    """Draws AP at each IoU threshold for every row, and beside it each row's gain over the first.

    Args:
        rows: at least one; each with `name` and `AP_by_iou`, ten numbers in per cent for IoU 0.50, 0.55, ...,
            0.95 (None leaves a hole).
        path: the PNG file to write.
        title: printed above.

    Raises:
        ValueError: no rows, or a row without ten numbers.
    """
    if not rows:
        raise ValueError("nothing to plot: no rows")
    for row in rows:
        if len(row["AP_by_iou"]) != len(IOU_THRESHOLDS):
            raise ValueError(f"row {row['name']}: AP_by_iou needs 10 numbers, not {len(row['AP_by_iou'])}")
    curves = [np.array(row["AP_by_iou"], float) for row in rows]
    figure, (left, right) = _figure(2, title=title)
    for i, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        style = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
            "linewidth": 1.6,
            "markeredgewidth": 0,
        }
        left.plot(IOU_THRESHOLDS, curve, label=row["name"], **style)
        right.plot(IOU_THRESHOLDS, curve - curves[0], **style)
    left.set_ylabel("AP (%)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8.5, loc="lower left")
    right.set_ylabel(f"gain in AP over {rows[0]['name']} (points)")
    for axes in (left, right):
        axes.set_xlabel("IoU threshold")
        axes.set_xticks(IOU_THRESHOLDS[::2])
    _save(figure, path)


def plot_ap_over_sigma_t(
    rows: Sequence[Mapping], path: str | os.PathLike, *, metrics: Sequence[str], title: str, paper: float
) -> None:
    """Draws metrics over the width of the IoU weight, and beside it what each gains over no voting.

    Args:
        rows: those with a `sigma_t` are points, in ascending order; the one whose `sigma_t` is None did not vote.
        path: the PNG file to write.
        metrics: keys of the rows, in per cent; one line for each.
        title: printed above.
        paper: the paper's `sigma_t`, marked.

    Raises:
        ValueError: no points, or not exactly one row that did not vote.
    """
    points = [row for row in rows if row["sigma_t"] is not None]
    without = [row for row in rows if row["sigma_t"] is None]
    if not points or len(without) != 1:
        raise ValueError(f"needs rows with a sigma_t and one without, not {len(points)} and {len(without)}")
    figure, (left, right) = _figure(2, title=title)
    xs = [row["sigma_t"] for row in points]
    for i, metric in enumerate(metrics):
        curve = np.array([row[metric] for row in points], float)
        base = float("nan") if without[0][metric] is None else without[0][metric]
        style = {"color": COLORS[i % len(COLORS)], "linewidth": 1.6}
        points_style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4.5, "markeredgewidth": 0}
        left.plot(xs, curve, label=metric, **style, **points_style)
        left.axhline(base, linestyle="--", **style | {"linewidth": 0.8})
        right.plot(xs, curve - base, **style, **points_style)
    left.set_ylabel("AP (%), dashed without voting")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8.5)
    right.set_ylabel("gain over no voting (points)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("sigma_t (dotted: the paper's)")
        axes.axvline(paper, color="0.6", linewidth=0.8, linestyle=":")
    _save(figure, path)


def plot_loss_curves(
    runs: Mapping[str, str | os.PathLike],
    path: str | os.PathLike,
    *,
    keys: Sequence[str] = ("loss",),
    title: str = "",
) -> None:
    """Draws scalars of training over the step, one panel for each key and one line for each run.

    Args:
        runs: name of each run and its `metrics.jsonl`, one JSON object with a `step` on each line. Lines
            without a key are skipped; of several lines for one step (a resumed run) the last counts.
        path: the PNG file to write.
        keys: what to draw.
        title: printed above.

    Raises:
        ValueError: no run, no key, or a file that never has a key.
    """
    if not runs or not keys:
        raise ValueError("nothing to plot: no runs or no keys")
    figure, panels = _figure(len(keys), title=title)
    for i, (name, source) in enumerate(runs.items()):
        lines = _read_lines(source)
        for key, axes in zip(keys, panels, strict=True):
            values = {line["step"]: line[key] for line in lines if key in line}
            if not values:
                found = sorted({other for line in lines for other in line} - {"step"})
                raise ValueError(f"{source}: no line has {key!r}; there are {', '.join(found) or 'none'}")
            steps = sorted(values)
            curve = [values[step] for step in steps]
            axes.plot(steps, curve, color=COLORS[i % len(COLORS)], linewidth=1.2, label=name)
    for key, axes in zip(keys, panels, strict=True):
        axes.set_xlabel("step")
        axes.set_ylabel(key)
    panels[0].legend(frameon=False, fontsize=8.5)
    _save(figure, path)


def _figure(num_panels: int, *, title: str) -> tuple[Figure, list[Axes]]:
    # No pyplot: it keeps every figure alive and picks a window system.
    figure = Figure(figsize=(4.8 * num_panels, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, panels


def _save(figure: Figure, path: str | os.PathLike) -> None:
    # Without the metadata the same curves give the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})


def _read_lines(path: str | os.PathLike) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        # A line without its end is one that a killed run did not finish.
        return [json.loads(line) for line in file if line.endswith("\n") and line.strip()]
