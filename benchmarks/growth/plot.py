"""The picture of docs/scaling.md: every cost over every size, both in units of their smallest."""

import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klbox_jax.report.plots import COLORS, MARKERS

COLUMNS = {"seconds": "time of a step", "compile_seconds": "time to compile", "bytes": "memory"}


def plot_growth(records: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Draws a panel for each step and cost, and a line in it for each axis that enters the step, as a PNG file.

    The records are the `axes` of growth.json; raises ValueError if there are none.
    """
    if not records:
        raise ValueError("nothing to plot: no axis was measured")
    # No pyplot: it keeps every figure alive and chooses a window system.
    figure = Figure(figsize=(11.0, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    steps = list(dict.fromkeys(record["step"] for record in records))
    panels = figure.subplots(len(steps), len(COLUMNS), squeeze=False, sharex=True)
    labels = list(dict.fromkeys(record["label"] for record in records))
    for (row, step), (column, quantity) in itertools.product(enumerate(steps), enumerate(COLUMNS)):
        axes = panels[row, column]
        drawn = [record for record in records if record["step"] == step and record["enters"]]
        for record in drawn:
            i = labels.index(record["label"])
            sizes, costs = np.array(record["sizes"]), np.array(record["costs"][quantity])
            axes.plot(
                sizes / sizes[0],
                costs / costs[0],
                label=record["label"],
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="-" if i < len(COLORS) else "--",
                linewidth=1.4,
                markersize=4,
                markeredgewidth=0,
            )
        longest = max((record["sizes"][-1] / record["sizes"][0] for record in drawn), default=1.0)
        axes.plot([1, longest], [1, longest], color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(f"{COLUMNS[quantity]}, {step} step", fontsize=9.5)
    for axes in panels[-1]:
        axes.set_xlabel("size over the smallest (dotted: linear)")
    handles = {}
    for axes in panels.flat:
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    for row in panels:
        row[0].set_ylabel("cost over the smallest")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
