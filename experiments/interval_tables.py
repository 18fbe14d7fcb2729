"""Tables of docs/intervals.md, from the results of `experiments.intervals` in docs/results."""

from collections.abc import Mapping

from experiments import stored_results
from klbox_jax.report.tables import markdown_table

# The coverage of the comparison between scales, and of the groups.
MAIN = 0.9
MEASURES = ("LaECE_0", "D_ECE", "LaACE_0")
SETS = {"scenes": "scenes, test", "aquarium": "Aquarium", "blood_cells": "blood cells"}
SCALES = {
    "scaled": "sigma (`scaled`)",
    "width_model": "width model",
    "multiplicative": "side (`multiplicative`)",
    "additive": "1 pixel (`additive`)",
}


def scale_table() -> str:
    """Returns the table of all sets and scales at 90 %."""
    rows: list[list[str]] = []
    for name, title in SETS.items():
        if not _has(name):
            rows.append([title, "not run yet", *["-"] * 4])
            continue
        by_scale = {row["scale"]: row for row in _records(name, "intervals") if row["asked"] == MAIN}
        for scale, text in SCALES.items():
            if scale in by_scale:
                rows.append([title, text, *_cells(by_scale[scale], by_scale["scaled"])])
    columns = ("images", "scale", "coverage, %", "mean width, px", "interval score", "over sigma")
    return markdown_table(columns, rows, text_columns=("scale",))


def _cells(row: Mapping, base: Mapping) -> list[str]:
    ratio = "" if row is base else f"{100 * (row['interval_score'] / base['interval_score'] - 1):+.0f} %"
    return [
        f"{100 * row['coverage']:.1f} ± {100 * row['coverage_std']:.1f}",
        f"{row['mean_width']:.1f}",
        f"{row['interval_score']:.1f}",
        ratio,
    ]


def coverage_table() -> str:
    """Returns the coverage of the intervals by sigma at each level that was asked."""
    rows = []
    for name in filter(_has, SETS):
        found = {row["asked"]: row for row in _records(name, "intervals") if row["scale"] == "scaled"}
        rows += [
            [
                SETS[name],
                f"{100 * asked:g}",
                f"{100 * row['coverage']:.1f} ± {100 * row['coverage_std']:.1f}",
                f"{100 * row['coverage_image_mean']:.1f}",
                f"{row['mean_width']:.1f}",
                f"{row['interval_score']:.1f}",
            ]
            for asked, row in found.items()
        ]
    columns = ("images", "asked, %", "coverage, %", "mean over images, %", "mean width, px", "interval score")
    return markdown_table(columns, rows)


def group_table() -> str:
    """Returns the coverage of each size and class at 90 %."""
    rows = [
        [
            SETS[name],
            row["group"],
            str(row["num"]),
            *(f"{100 * row[kind]:.1f}" for kind in (*SCALES, "by class")),
        ]
        for name in filter(_has, SETS)
        for row in _records(name, "groups")
    ]
    columns = ("images", "boxes", "number", "sigma", "width model", "side", "1 pixel", "sigma, level `class`")
    return markdown_table(columns, rows, text_columns=("boxes",))


def score_table() -> str:
    """Returns the measures of the scores before and after each calibration."""
    rows = [
        [
            SETS[name],
            f"{row['min_score']:g} or more" if row["min_score"] else "all",
            row["method"],
            *(f"{row[measure]:.4f}" for measure in MEASURES),
        ]
        for name in filter(_has, SETS)
        for row in _records(name, "scores")
    ]
    columns = ("images", "scores", "calibration", "LaECE_0", "D-ECE", "LaACE_0")
    return markdown_table(columns, rows, text_columns=("scores", "calibration"))


TABLES = {
    "intervals by scale": scale_table,
    "intervals by coverage": coverage_table,
    "intervals by group": group_table,
    "calibrated scores": score_table,
}


def _has(name: str) -> bool:
    return (stored_results.RESULTS / f"intervals_{name}.json").exists()


def _records(name: str, key: str) -> list[dict]:
    return stored_results.read(f"intervals_{name}")[key]
