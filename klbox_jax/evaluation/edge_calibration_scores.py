"""Measures of a detector's calibrated intervals and scores on images that it was not calibrated on."""

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.detected_edges import matched_edges
from klbox_jax.evaluation.edge_calibration import COVERAGES, EdgeCalibration
from klbox_jax.evaluation.interval_scores import (
    coco_sizes,
    interval_score,
    summarize_by_group,
    summarize_intervals,
)
from klbox_jax.evaluation.score_calibration_error import evaluate_scores
from klbox_jax.evaluation.uncertainty import EDGES

# Most detections of soft-NMS have scores near 0; a user is shown those of this score or more.
SHOWN_SCORE = 0.5


def evaluate_edge_calibration(
    ground_truth: dict, results: list[dict], calibration: EdgeCalibration
) -> dict[str, Any]:
    """Measures the intervals and the calibrated scores of a results list.

    Args:
        ground_truth: COCO dictionary; see `fit_edge_calibration`.
        results: detections with `bbox_std`, as they leave the network.
        calibration: fitted to other images.

    Returns:
        `intervals`: `promise`, `iou_threshold`, `num_labels` and `num_images` of the fit, and for each of `COVERAGES`,
        as text, the numbers of `summarize_intervals` with `by_edge` (coverage, mean width and interval score of
        `x1`, `y1`, `x2`, `y2`), `by_class` and `by_size` (COCO's sizes of the label).
        `score_calibration`: `before` and `after`, see `evaluate_scores`, of all detections; and `shown`, both for those
        whose score before is `SHOWN_SCORE` or more.
    """
    edges = matched_edges(ground_truth, results, iou_threshold=calibration.iou_threshold, min_score=0.0)
    names = {entry["id"]: entry["name"] for entry in ground_truth["categories"]}
    groups = {
        "by_class": np.array([names[category] for category in edges.detected.classes.tolist()], dtype=str),
        "by_size": coco_sizes(edges.detected.boxes + edges.errors),
    }
    by_coverage: dict[str, Any] = {}
    for coverage in COVERAGES:
        fitted = calibration.intervals(coverage)
        # Without a match there are no stds, and errors has no rows either.
        half = fitted.half_widths(edges.errors if edges.detected.stds is None else edges.detected.stds)
        arrays = (edges.errors, half, half, edges.image_ids)
        found = summarize_intervals(*arrays, coverage=coverage)
        found["by_edge"] = _by_edge(edges.errors, half, coverage)
        for name, group in groups.items():
            found[name] = summarize_by_group(group, *arrays, coverage=coverage)
        by_coverage[f"{coverage:g}"] = found
    shown = [entry for entry in results if entry["score"] >= SHOWN_SCORE]
    return {
        "intervals": {
            "promise": calibration.file_promise(),
            "iou_threshold": calibration.iou_threshold,
            "num_labels": fitted.num_labels,
            "num_images": fitted.num_images,
            **by_coverage,
        },
        "score_calibration": _before_and_after(ground_truth, results, calibration)
        | {"shown": _before_and_after(ground_truth, shown, calibration), "shown_score": SHOWN_SCORE},
    }


def summary_line(found: dict[str, Any]) -> str:
    """Returns the most important numbers of `evaluate_edge_calibration` in one line."""
    parts = []
    for coverage in COVERAGES:
        row = found["intervals"][f"{coverage:g}"]
        if row["coverage"] is not None:
            width = "infinite" if row["mean_width"] is None else f"{row['mean_width']:.1f} px"
            parts.append(f"{100 * coverage:g} %: {100 * row['coverage']:.1f} % of boxes, {width}")
    before, after = (found["score_calibration"][key]["LaECE_0"] for key in ("before", "after"))
    if before is not None:
        parts.append(f"LaECE_0 {before:.3f} before and {after:.3f} after score calibration")
    return "intervals: " + "; ".join(parts or ["no matched detection"])


def _by_edge(
    errors: Float[ndarray, "n 4"], half: Float[ndarray, "n 4"], coverage: float
) -> dict[str, dict[str, float | None]]:
    """Coverage, mean width and interval score of each edge, which is scored at a quarter of the miss probability."""
    found = {}
    finite = bool(np.isfinite(half).all())
    scores = interval_score(errors, half, half, coverage=1 - (1 - coverage) / 4) if finite else None
    for column, edge in enumerate(EDGES):
        inside = np.abs(errors[:, column]) <= half[:, column]
        found[edge] = {
            "coverage": float(inside.mean()) if len(errors) else None,
            "mean_width": float(2 * half[:, column].mean()) if finite and len(errors) else None,
            "interval_score": float(scores[:, column].mean()) if finite and len(errors) else None,
        }
    return found


def _before_and_after(
    ground_truth: dict, results: list[dict], calibration: EdgeCalibration
) -> dict[str, dict[str, Any]]:
    """Measures of the scores of results before and after their calibration."""
    classes = np.array([entry["category_id"] for entry in results])
    scores = calibration.calibrated_scores([entry["score"] for entry in results], classes).tolist()
    rescored = [entry | {"score": score} for entry, score in zip(results, scores, strict=True)]
    return {
        "before": evaluate_scores(ground_truth, results),
        "after": evaluate_scores(ground_truth, rescored),
    }
