"""Matplotlib figures: average precision over IoU and sigma_t, reliability diagrams, scatter plots."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy import ndarray

# Okabe and Ito's colours for a white background: black for the baseline, no yellow.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
IOU_THRESHOLDS = tuple((50 + 5 * i) / 100 for i in range(10))


def plot_ap_over_iou(rows: Sequence[Mapping], path: str | os.PathLike, *, title: str) -> None:
    """Draws AP at each IoU threshold for every row, and the gain of each row over the first next to it.

    Args:
        rows: at least one; each with `name` and `AP_by_iou`, ten numbers in per cent for IoU 0.50, 0.55, ...,
            0.95 (None leaves a gap).
        path: PNG file to write.
        title: printed above the panels.

    Raises:
        ValueError: no rows, or a row that does not have ten numbers.
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
    """Draws metrics over sigma_t, the width of the IoU weight, and the gain over no voting next to it.

    Args:
        rows: results with voting, in ascending order of `sigma_t`, and one without, whose `sigma_t` is None.
        path: PNG file to write.
        metrics: keys of the rows, in per cent; one line for each.
        title: printed above the panels.
        paper: the paper's `sigma_t`, marked by a dotted line.

    Raises:
        ValueError: no row with voting, or not exactly one row without.
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


def plot_reliability(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | os.PathLike,
    *,
    levels: Sequence[float],
    title: str,
) -> None:
    """Draws the share of labels below each predicted quantile over the level of the quantile.

    Calibrated stds give the diagonal.

    Args:
        panels: by panel title, the shares at each level by edge name.
        path: PNG file to write.
        levels: of the quantiles, 0 to 1.
        title: printed above the panels.

    Raises:
        ValueError: no panels, or a curve whose number of shares differs from the number of levels.
    """
    if not panels:
        raise ValueError("nothing to plot: no panels")
    figure, all_axes = _figure(len(panels), title=title, zero_line=False)
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
        for i, edge in enumerate(sorted(curves)):  # the same colour in all panels
            curve = curves[edge]
            if len(curve) != len(levels):
                raise ValueError(f"{name}, {edge}: {len(curve)} shares for {len(levels)} levels")
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(levels, curve, label=edge, markersize=3.5, markeredgewidth=0, linewidth=1.2, **style)
        axes.set_title(name, fontsize=9.5)
        axes.set_xlabel("level of the predicted quantile")
        axes.set_ylabel("share of labels below it")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
    all_axes[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    _save(figure, path)


@dataclasses.dataclass(frozen=True)
class Scatter:
    """One panel of a scatter plot.

    Attributes:
        xs, ys: coordinates of the points.
        x_label, y_label: of the axes.
        title: printed above the panel.
        is_ratio: compares y with x: both axes are logarithmic with equal scale, and the diagonal is drawn. Points that
            are not positive are left out.
    """

    xs: Float[ndarray, " n"]
    ys: Float[ndarray, " n"]
    x_label: str
    y_label: str
    title: str
    is_ratio: bool = False


def plot_scatters(panels: Sequence[Scatter], path: str | os.PathLike, *, title: str) -> None:
    """Draws scatter plots next to each other; raises ValueError if there are no panels."""
    if not panels:
        raise ValueError("nothing to plot: no panels")
    figure, all_axes = _figure(len(panels), title=title, zero_line=False)
    for i, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
        xs, ys = panel.xs, panel.ys
        if panel.is_ratio:
            positive = (xs > 0) & (ys > 0)
            xs, ys = xs[positive], ys[positive]
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_aspect("equal")
            axes.axline((1, 1), (10, 10), color="0.6", linewidth=0.8, linestyle="--")
        else:
            axes.margins(0.03)
        color = COLORS[(i + 1) % len(COLORS)]
        axes.plot(xs, ys, linestyle="", marker=".", markersize=3, markeredgewidth=0, color=color)
        axes.set_title(panel.title, fontsize=9.5)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
    _save(figure, path, dpi=100)  # lower, because points compress badly


def _figure(num_panels: int, *, title: str, zero_line: bool = True) -> tuple[Figure, list[Axes]]:
    # Not pyplot, which keeps every figure in memory and selects a window system.
    figure = Figure(figsize=(4.8 * num_panels, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        if zero_line:
            axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, panels


def _save(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    # Without metadata, the same curves give the same bytes.
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
