"""HTML page of a report: one file with its style, script and pictures, which loads nothing from elsewhere.

Numbers, charts and tables are in the text; `page.js` fills the galleries and the image browser from JSON. A
content security policy forbids everything except the style, the script and the pictures of the page itself.
"""

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.calibration_error import LEVELS
from klbox_jax.report.charts import Axes, Series, chart
from klbox_jax.report.page_data import Run, curves
from klbox_jax.report.page_examples import GALLERIES, Examples
from klbox_jax.report.page_tables import config_table, facts_table, number_at, number_tables
from klbox_jax.report.plots import IOU_THRESHOLDS

_LOSSES = ("train/total_loss", "train/loss")
_NUM_BINS = 10
_NUM_DOTS = 1200
_RELIABILITY_AXES = Axes(
    x_label="quantile", y_label="share of labels below", x_range=(0.0, 1.0), y_range=(0.0, 1.0), diagonal=True
)


def make_page(runs: Sequence[Run], examples: Examples | None, *, missing: str = "") -> str:
    """Returns the HTML text of the report.

    Args:
        runs: one run, or two to compare.
        examples: their detections and pictures, or None.
        missing: reason why there are no examples.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    title = " and ".join(run.label for run in runs)
    sections = {
        "numbers": ("Numbers", number_tables(runs)),
        "training": ("Training", _training(runs)),
        "evaluation": ("Accuracy and calibration", _evaluation(runs, examples)),
        **_browsing(runs, examples, missing),
        "config": ("Config", config_table(runs)),
    }
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, (heading, _) in sections.items())
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-heading"><h2 id="{key}-heading">{heading}</h2>'
        f"{content}</section>"
        for key, (heading, content) in sections.items()
    )
    data = ""
    if examples is not None:
        data = _json_block("data", examples.content) + _json_block("pictures", examples.pictures)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body>"
        '<a class="skip" href="#main">Skip to the report</a>'
        f'<header><h1>{escape(title)}</h1>{facts_table(runs)}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main" tabindex="-1">{body}</main>{data}<script>{script}</script></body></html>\n'
    )


def _asset(name: str) -> str:
    return importlib.resources.files("klbox_jax.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_block(name: str, value: Any) -> str:
    """Returns a script element that only holds data; no text inside can close it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _training(runs: Sequence[Run]) -> str:
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
        return f"<div>{chart(series, title=key, axes=Axes(x_label='step'))}</div>"

    first = [key for key in keys if "loss" in key or key.startswith("evaluation/")]
    others = "".join(draw(key) for key in keys if key not in first)
    more = f"<details><summary>Other numbers of the training</summary><div class='charts'>{others}</div></details>"
    return f"<div class='charts'>{''.join(map(draw, first))}</div>{more if others else ''}"


def _evaluation(runs: Sequence[Run], examples: Examples | None) -> str:
    parts = []
    found = [run.metrics.get("AP_by_iou") for run in runs]
    series = [
        Series(name=run.label, xs=IOU_THRESHOLDS, ys=aps, style=i, form="marked")
        for i, (run, aps) in enumerate(zip(runs, found, strict=True))
        if aps and any(ap is not None for ap in aps)
    ]
    if series:
        axes = Axes(x_label="IoU threshold", y_label="AP (%)")
        parts.append(chart(series, title="AP over IoU", axes=axes))
    for i, run in enumerate(runs):
        by_edge = number_at(run.metrics, "uncertainty.calibration.curve")
        if by_edge is None:
            parts.append(f"<p>{escape(run.label)} has no sigma, and so no reliability diagram.</p>")
            continue
        edges = [
            Series(name=edge, xs=LEVELS.tolist(), ys=by_edge[edge], style=j, form="marked")
            for j, edge in enumerate(by_edge)
        ]
        parts.append(chart(edges, title=f"Reliability of {run.label}", axes=_RELIABILITY_AXES))
        pairs = examples.sigma_and_error[i] if examples is not None else None
        if pairs is not None and pairs.shape[1]:
            parts.append(_sigma_chart(pairs, run.label))
    return f"<div class='charts'>{''.join(f'<div>{part}</div>' for part in parts)}</div>"


def _sigma_chart(pairs: Float[ndarray, "2 m"], label: str) -> str:
    """Returns a chart of some edges as dots, and the RMS error of bins of equal count along sigma."""
    pairs = pairs[:, np.argsort(pairs[0], kind="stable")]
    dots = pairs[:, :: max(1, pairs.shape[1] // _NUM_DOTS)]
    bins = np.array_split(pairs, min(_NUM_BINS, pairs.shape[1]), axis=1)
    sigma, error = np.sqrt([(part**2).mean(axis=1) for part in bins]).T
    floor = 0.05  # pixels; smaller errors are drawn here, because the scale is logarithmic
    return chart(
        [
            Series(
                name="an edge",
                xs=dots[0].tolist(),
                ys=np.maximum(dots[1], floor).tolist(),
                style=1,
                form="dots",
            ),
            Series(name="RMS of a tenth", xs=sigma.tolist(), ys=error.tolist(), style=0, form="marked"),
        ],
        title=f"Error over sigma, {label}",
        axes=Axes(x_label="sigma (px)", y_label="error (px)", log=True, diagonal=True),
    )


def _browsing(runs: Sequence[Run], examples: Examples | None, missing: str) -> dict[str, tuple[str, str]]:
    """Returns the sections that the script fills: galleries and image browser."""
    if examples is None:
        note = f"There are no pictures, and nothing else that needs the data set: {escape(missing)}"
        return {"browser": ("Images", f'<p class="note" id="no-pictures">{note}</p>')}
    galleries = "".join(
        f"<h3>{escape(GALLERIES[gallery['key']])}{_of(runs, gallery['run'])}</h3>"
        + (
            f'<ul class="gallery" data-gallery="{number}"></ul>'
            if gallery["items"]
            else f"<p>{_why_empty(examples.content, gallery)}</p>"
        )
        for key in GALLERIES
        for number, gallery in enumerate(examples.content["galleries"])
        if gallery["key"] == key
    )
    classes = "".join(
        f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(examples.content["classes"])
    )
    panels = "".join(
        f'<div class="panel"><h3>{escape(run.label)}</h3><p class="count" role="status" aria-live="polite" '
        f'data-count="{i}"></p><div data-picture="{i}"></div>'
        f"<details><summary>The boxes of this image as a table</summary><div data-rows='{i}'></div></details></div>"
        for i, run in enumerate(runs)
    )
    limits = examples.content["sigma_limits"]
    sigma = (
        '<label>At most this sigma <output id="sigma-shown"></output><input type="range" id="sigma" min="0"></label>'
        '<label>Sigma in <select id="unit"><option value="px">pixels</option>'
        '<option value="relative">shares of the box</option></select></label>'
    )
    count = len(examples.content["images"])
    browser = f"""<form id="filters"><label>Image <output id="image-shown"></output>
<input type="range" id="image" min="0" max="{count - 1}" value="0"></label>
<span class="buttons"><button type="button" id="previous">Previous image</button>
<button type="button" id="next">Next image</button></span>
<label>At least this score <output id="score-shown"></output>
<input type="range" id="score" min="0" max="1" step="0.01" value="0.5"></label>{sigma if limits else ""}
<label>Class <select id="class"><option value="">all classes</option>{classes}</select></label>
<label class="check"><input type="checkbox" id="objects" checked> true boxes (dashed)</label></form>
<p>The left and right arrow keys step through the images. The bands are one and two sigma of each edge.</p>
<ul class="legend" id="kinds"></ul><div class="panels">{panels}</div>"""
    hint = "<p>Dashed lines show the object matched with the detection, or all objects of the image if it has none.</p>"
    return {"galleries": ("Galleries", hint + galleries), "browser": ("Images", browser)}


def _why_empty(content: dict, gallery: dict) -> str:
    if gallery["key"] == "uncertain" and not content["runs"][gallery["run"]]["stds"]:
        return "The run has no sigma."
    return "There are none."


def _of(runs: Sequence[Run], number: int) -> str:
    return f" ({escape(runs[number].label)})" if len(runs) > 1 else ""
