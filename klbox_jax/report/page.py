"""HTML page of a report: one file with its style, scripts and pictures, which loads nothing from elsewhere.

Numbers, charts and tables are in the text; the scripts fill the galleries and the image browser from JSON. A content
security policy forbids everything except the style, the script and the pictures of the page itself.
"""

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from klbox_jax.report.glossary import GLOSSARY
from klbox_jax.report.page_accuracy import ClassAccuracy
from klbox_jax.report.page_browser import browser, galleries
from klbox_jax.report.page_charts import calibration_charts, precision_recall_charts, training_charts
from klbox_jax.report.page_data import Run
from klbox_jax.report.page_errors import error_tables
from klbox_jax.report.page_examples import Examples
from klbox_jax.report.page_tables import config_table, facts_table, number_tables

_SCRIPTS = ("page_pictures.js", "page_browser.js", "page.js")


def make_page(
    runs: Sequence[Run],
    examples: Examples | None = None,
    accuracies: Sequence[ClassAccuracy] = (),
    *,
    missing: str = "",
) -> str:
    """Returns the HTML text of the report.

    Args:
        runs: one run, or two to compare.
        examples: their detections and pictures; None without the data set.
        accuracies: accuracy by class of each run; empty without the data set.
        missing: reason why there is no data set.
    """
    style, script = _asset("page.css"), "".join(map(_asset, _SCRIPTS))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    title = " and ".join(run.label for run in runs)
    sections = _sections(runs, examples, accuracies, missing)
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
        f"<header><h1>{escape(title)}</h1>{facts_table(runs)}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'<main id="main" tabindex="-1">{body}</main>{data}<script>{script}</script></body></html>\n'
    )


def _sections(
    runs: Sequence[Run], examples: Examples | None, accuracies: Sequence[ClassAccuracy], missing: str
) -> dict[str, tuple[str, str]]:
    """Returns heading and content of each section, by its anchor."""
    sigma_and_error = examples.sigma_and_error if examples is not None else None
    sections = {
        "numbers": ("Numbers", number_tables(runs)),
        "training": ("Training", training_charts(runs)),
        "evaluation": ("Accuracy and calibration", calibration_charts(runs, sigma_and_error)),
    }
    if examples is None:
        note = f"There are no pictures, and nothing else that needs the data set: {escape(missing)}"
        sections["browser"] = ("Images", f'<p class="note" id="no-pictures">{note}</p>')
    else:
        sections |= {
            "curves": ("Precision and recall", precision_recall_charts(runs, accuracies)),
            "errors": (
                "Errors by class",
                f'<div class="tables errors">{error_tables(runs, accuracies)}</div>',
            ),
            "galleries": ("Galleries", galleries(runs, examples.content)),
            "browser": ("Images", browser(runs, examples.content)),
        }
    return sections | {"config": ("Config", config_table(runs)), "glossary": ("Glossary", _glossary())}


def _glossary() -> str:
    entries = "".join(
        f'<div id="about-{key}"><dt>{escape(term.name)}</dt><dd>{escape(term.meaning)}'
        f"{f' {term.better.capitalize()} is better.' if term.better else ''}</dd></div>"
        for key, term in GLOSSARY.items()
    )
    return f'<dl class="glossary">{entries}</dl>'


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
