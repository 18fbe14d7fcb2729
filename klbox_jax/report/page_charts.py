"""Charts of the report page: training curves, accuracy over IoU, calibration and precision-recall curves."""

from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.calibration_error import LEVELS
from klbox_jax.evaluation.precision_recall import RECALL_LEVELS
from klbox_jax.report.charts import Axes, Series, chart
from klbox_jax.report.glossary import title_of
from klbox_jax.report.page_accuracy import IOU_THRESHOLDS, ClassAccuracy
from klbox_jax.report.page_data import Run, curves
from klbox_jax.report.page_tables import number_at

_LOSSES = ("train/total_loss", "train/loss")
_AP_THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]
_NUM_BINS = 10
_NUM_DOTS = 1200
_MIN_DRAWN_ERROR = 0.05  # pixels; smaller errors are drawn here, because the scale is logarithmic
_MAX_OPEN_CLASSES = 11
_UNIT_RANGE = (0.0, 1.0)
_RELIABILITY_AXES = Axes(
    x_label="quantile",
    y_label="share of labels below",
    x_range=_UNIT_RANGE,
    y_range=_UNIT_RANGE,
    diagonal=True,
)
_PRECISION_AXES = Axes(x_label="recall", y_label="precision", x_range=_UNIT_RANGE, y_range=_UNIT_RANGE)


def training_charts(runs: Sequence[Run]) -> str:
    """Returns charts of the losses and evaluations over the steps, and a folded part with the other metrics."""
    found = [curves(run) for run in runs]
    keys = sorted({key for one in found for key in one}, key=lambda key: (key not in _LOSSES, key))
    if not keys:
        return "<p>The run has no curve of two points or more.</p>"

    def draw(key: str) -> str:
        series = [
            Series(name=run.label if len(runs) > 1 else "", xs=one[key][0], ys=one[key][1], style=i)
            for i, (run, one) in enumerate(zip(runs, found, strict=True))
            if key in one
        ]
        return chart(series, title=title_of(key), axes=Axes(x_label="step"))

    first = [key for key in keys if "loss" in key or key.startswith("evaluation/")]
    others = [key for key in keys if key not in first]
    more = f"<details><summary>Other training metrics</summary>{_grid(map(draw, others))}</details>"
    return _grid(map(draw, first)) + (more if others else "")


def calibration_charts(
    runs: Sequence[Run], sigma_and_error: Sequence[Float[ndarray, "2 _"] | None] | None
) -> str:
    """Returns AP over IoU, and the reliability diagram and the errors over sigma of each run.

    Args:
        runs: one or two.
        sigma_and_error: see `klbox_jax.report.page_examples.Examples`; None without the data set.
    """
    parts, notes = [], []
    found = [run.metrics.get("AP_by_iou") for run in runs]
    series = [
        Series(name=run.label, xs=_AP_THRESHOLDS, ys=aps, style=i, form="marked")
        for i, (run, aps) in enumerate(zip(runs, found, strict=True))
        if aps and any(ap is not None for ap in aps)
    ]
    if series:
        axes = Axes(x_label="IoU threshold", y_label="AP (%)")
        parts.append(chart(series, title="AP over the IoU threshold", axes=axes))
    for i, run in enumerate(runs):
        by_edge = number_at(run.metrics, "uncertainty.calibration.curve")
        if by_edge is None:
            notes.append(f"<p>{escape(run.label)} predicts no sigma, so it has no reliability diagram.</p>")
            continue
        edges = [
            Series(name=f"edge {edge}", xs=LEVELS.tolist(), ys=by_edge[edge], style=j, form="marked")
            for j, edge in enumerate(by_edge)
        ]
        parts.append(chart(edges, title=f"Reliability diagram, {run.label}", axes=_RELIABILITY_AXES))
        pairs = sigma_and_error[i] if sigma_and_error is not None else None
        if pairs is not None and pairs.shape[1]:
            parts.append(_sigma_chart(pairs, run.label))
    return _grid(parts) + "".join(notes)


def precision_recall_charts(runs: Sequence[Run], accuracies: Sequence[ClassAccuracy]) -> str:
    """Returns precision-recall curves of all classes together and of each class; many classes are folded."""
    names = list(dict.fromkeys(name for accuracy in accuracies for name in accuracy.class_names))
    thresholds = IOU_THRESHOLDS if len(runs) == 1 else IOU_THRESHOLDS[:2]

    def draw(title: str, classes: Sequence[str]) -> str:
        series = []
        for i, (run, accuracy) in enumerate(zip(runs, accuracies, strict=True)):
            for j, threshold in enumerate(thresholds):
                curve = _mean_curve([accuracy.precision[threshold].get(name) for name in classes])
                if curve is not None:
                    who = f"{run.label}, " if len(runs) > 1 else ""
                    name = f"{who}IoU {threshold:g}: AP {100 * curve.mean():.1f}"
                    style, dash = (i, 2 * j) if len(runs) > 1 else (j, j)
                    reached = np.append(curve[:-1] > 0, False)
                    end = int(reached.sum()) + 1  # the curve is drawn down to 0, not along the axis
                    xs, ys = RECALL_LEVELS[:end].tolist(), curve[:end].tolist()
                    series.append(Series(name=name, xs=xs, ys=ys, style=style, dash=dash))
        return chart(series, title=title, axes=_PRECISION_AXES) if series else ""

    charts = [draw(name, [name]) for name in names]
    present = [drawn for drawn in charts if drawn]
    everything = draw("All classes (mean)", names)
    if len(present) <= _MAX_OPEN_CLASSES:
        return _grid([everything, *present])
    folded = f"<details><summary>Curves of {len(present)} classes</summary>{_grid(present)}</details>"
    return _grid([everything]) + folded


def _mean_curve(found: Sequence[Float[ndarray, "101"] | None]) -> Float[ndarray, "101"] | None:
    present = [curve for curve in found if curve is not None]
    return np.mean(present, axis=0) if present else None


def _grid(charts) -> str:
    return f"<div class='charts'>{''.join(f'<div>{one}</div>' for one in charts if one)}</div>"


def _sigma_chart(pairs: Float[ndarray, "2 m"], label: str) -> str:
    """Returns a chart of some edges as dots, and the RMS error of bins of equal count along sigma."""
    pairs = pairs[:, np.argsort(pairs[0], kind="stable")]
    dots = pairs[:, :: max(1, pairs.shape[1] // _NUM_DOTS)]
    bins = np.array_split(pairs, min(_NUM_BINS, pairs.shape[1]), axis=1)
    sigma, error = np.sqrt([(part**2).mean(axis=1) for part in bins]).T
    errors = np.maximum(dots[1], _MIN_DRAWN_ERROR).tolist()
    return chart(
        [
            Series(name="one edge", xs=dots[0].tolist(), ys=errors, style=1, form="dots"),
            Series(
                name="RMS of a tenth of the edges",
                xs=sigma.tolist(),
                ys=error.tolist(),
                style=0,
                form="marked",
            ),
        ],
        title=f"Error over sigma, {label}",
        axes=Axes(x_label="sigma (px)", y_label="error (px)", log=True, diagonal=True),
    )
