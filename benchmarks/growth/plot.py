"""The picture of docs/scaling.md: every cost over every size, both in units of their smallest."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klbox_jax.report.plots import COLORS, MARKERS

COLUMNS = {"seconds": "time of a step", "compile_seconds": "time to compile", "bytes": "memory"}


def plot_growth(records: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Draws a panel for each step and cost, and a line in it for each axis that enters the step.

    Args:
        records: of growth.json's `axes`.
        path: the PNG file to write.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("nothing to plot: no axis was measured")
    # No pyplot: it keeps every figure alive and picks a window system.
    figure = Figure(figsize=(11.0, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    steps = list(dict.fromkeys(record["step"] for record in records))
    panels = figure.subplots(len(steps), len(COLUMNS), squeeze=False, sharex=True)
    labels = list(dict.fromkeys(record["label"] for record in records))
    for row, step in zip(panels, steps, strict=True):
        for axes, (quantity, title) in zip(row, COLUMNS.items(), strict=True):
            longest = 1.0
            for record in records:
                if record["step"] != step or not record["enters"]:
                    continue
                i = labels.index(record["label"])
                sizes, costs = record["sizes"], record["costs"][quantity]
                xs = [size / sizes[0] for size in sizes]
                longest = max(longest, xs[-1])
                style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
                axes.plot(
                    xs,
                    [cost / costs[0] for cost in costs],
                    label=record["label"],
                    linestyle="-" if i < len(COLORS) else "--",
                    linewidth=1.4,
                    markersize=4,
                    markeredgewidth=0,
                    **style,
                )
            axes.plot([1, longest], [1, longest], color="0.6", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.set_title(f"{title}, {step} step", fontsize=9.5)
    for axes in panels[-1]:
        axes.set_xlabel("size over the smallest (dotted: linear)")
    for row in panels:
        row[0].set_ylabel("cost over the smallest")
    handles = {}
    for axes in panels.flat:
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
