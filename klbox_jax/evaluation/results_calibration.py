"""Calibration of the COCO results of any detector: intervals of the edges, and scores that are expected IoUs.

Results with `bbox_std` get intervals scaled by sigma; others get a width model of box, score and class.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.array_checks import choice
from klbox_jax.evaluation.conformal import fit_intervals, split_images
from klbox_jax.evaluation.detected_edges import WIDTHS, MatchedEdges, detected_edges, matched_edges
from klbox_jax.evaluation.interval_scores import summarize_intervals
from klbox_jax.evaluation.intervals import Intervals
from klbox_jax.evaluation.matching import check_entries
from klbox_jax.evaluation.score_calibration import METHODS, ScoreCalibration, fit_scores
from klbox_jax.evaluation.score_calibration_error import laece_0, matched_scores
from klbox_jax.evaluation.width_model import WidthModel


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """Choices of a calibration, stored with it.

    Attributes:
        coverages: of the intervals, each above 0 and below 1.
        widths: `scaled`, `additive`, `multiplicative` (see `interval_scales`), `width_model`, or `auto`: `scaled` for
            results with `bbox_std` and `width_model` for others.
        multiplicity, level, missed_share, asymmetric: see `klbox_jax.evaluation.conformal.fit_intervals`.
        scores: method of `fit_scores`, or `none` to leave scores as they are.
        iou_threshold: IoU of a match, for the intervals; scores count any overlap.
        min_score: detections with a lower score are not used; the calibration says nothing about them.
    """

    coverages: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    widths: str = "auto"
    multiplicity: str = "max"
    level: str = "box"
    missed_share: float = 0.0
    asymmetric: bool = False
    scores: str = "isotonic"
    iou_threshold: float = 0.5
    min_score: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class ResultsCalibration:
    """Fitted intervals and scores of a detector's results.

    Attributes:
        settings: with `widths` as they were chosen.
        intervals: by coverage.
        width_model: None unless `settings.widths` is `width_model`.
        scores: None where scores stay as they are.
        check: measured on images that were left out, see `check_by_split`; None with fewer than four images.
    """

    settings: CalibrationSettings
    intervals: Mapping[float, Intervals]
    width_model: WidthModel | None
    scores: ScoreCalibration | None
    check: Mapping[str, Any] | None

    def apply(self, results: list[dict]) -> list[dict]:
        """Returns the results with calibrated scores and the interval of each edge.

        Args:
            results: COCO results of the same detector under the same post-processing.

        Returns:
            New entries. `score` is calibrated, and `score_uncalibrated` what it was. `edge_intervals` has for each
            coverage, as text, `lower` and `upper`: coordinates of `x1, y1, x2, y2` in pixels, None where they are
            infinite. It is None for a score below `settings.min_score`.

        Raises:
            ValueError: an entry lacks a field or is not finite, or has no `bbox_std` where the intervals need it.
        """
        check_results(results)
        if not results:
            return []
        if self.settings.widths == "scaled" and "bbox_std" not in results[0]:
            raise ValueError(
                "the results have no bbox_std, and the intervals were fitted with it; give results of the same "
                "detector, or calibrate with widths=width_model"
            )
        edges = detected_edges(results)
        scales = edges.scales(self.settings.widths, self.width_model)
        ends = {}
        for coverage, fitted in self.intervals.items():
            lower, upper = _both(fitted.half_widths(scales, edges.classes))
            ends[f"{coverage:g}"] = _plain(edges.boxes - lower), _plain(edges.boxes + upper)
        calibrated = None if self.scores is None else self.scores.calibrate(edges.scores, edges.classes)
        found = []
        for i, entry in enumerate(results):
            intervals = {name: {"lower": low[i], "upper": high[i]} for name, (low, high) in ends.items()}
            more = {"edge_intervals": intervals if entry["score"] >= self.settings.min_score else None}
            if calibrated is not None:
                more |= {"score": float(calibrated[i]), "score_uncalibrated": entry["score"]}
            found.append(entry | more)
        return found

    def lines(self) -> list[str]:
        """Returns what a user should read: the promise, missing labels, and what was measured on images left out."""
        lines = [self.intervals[max(self.intervals)].promise()]
        lines += [text for fitted in self.intervals.values() if (text := fitted.warning())]
        if self.check is None:
            return lines
        for name, by_coverage in self.check["intervals"].items():
            for coverage, row in by_coverage.items():
                if row["mean_width"] is not None:
                    lines.append(
                        f"{name}, {coverage} asked: {row['coverage']:.3f} of {row['num']} boxes covered, mean width "
                        f"{row['mean_width']:.1f} px, interval score {row['interval_score']:.1f}"
                    )
        if self.check["LaECE_0"]:
            before, after = (self.check["LaECE_0"][key] for key in ("before", "after"))
            lines.append(f"LaECE_0 {before:.3f} before and {after:.3f} after {self.settings.scores}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, texts and None for JSON."""
        return {
            "settings": dataclasses.asdict(self.settings) | {"coverages": list(self.settings.coverages)},
            "intervals": [fitted.to_dict() for fitted in self.intervals.values()],
            "width_model": None if self.width_model is None else self.width_model.to_dict(),
            "scores": None if self.scores is None else self.scores.to_dict(),
            "check": self.check,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ResultsCalibration":
        """Returns the record that `to_dict` wrote."""
        settings = fields["settings"] | {"coverages": tuple(fields["settings"]["coverages"])}
        intervals = [Intervals.from_dict(fitted) for fitted in fields["intervals"]]
        model, scores = fields["width_model"], fields["scores"]
        return cls(
            settings=CalibrationSettings(**settings),
            intervals={fitted.coverage: fitted for fitted in intervals},
            width_model=None if model is None else WidthModel.from_dict(model),
            scores=None if scores is None else ScoreCalibration.from_dict(scores),
            check=fields["check"],
        )


def fit_results(ground_truth: dict, results: list[dict], settings: CalibrationSettings) -> ResultsCalibration:
    """Fits intervals and scores to a results list.

    Args:
        ground_truth: COCO dictionary of images that the detector was not trained on; the label of an object is
            `bbox_noisy` where it has one, otherwise `bbox`.
        results: detections of these images, with scores from 0 to 1; all have `bbox_std`, or none.
        settings: what to fit.

    Raises:
        ValueError: an entry is at fault (see `klbox_jax.evaluation.matching.check_entries`), nothing matches, there are
            too few images for every coverage, or a setting is unknown.
    """
    choice("widths", settings.widths, ("auto", *WIDTHS))
    choice("scores", settings.scores, (*METHODS, "none"))
    if not settings.coverages:
        raise ValueError("coverages is empty; give one or more, such as 0.9")
    edges = _matched(ground_truth, results, settings)
    if settings.widths == "auto":
        settings = dataclasses.replace(
            settings, widths="width_model" if edges.detected.stds is None else "scaled"
        )
    if settings.widths == "scaled" and edges.detected.stds is None:
        raise ValueError("widths = 'scaled' needs results with bbox_std; choose width_model or auto")
    intervals = _fit_all(edges, settings, settings.widths)
    if not any(np.isfinite(fitted.factors).any() for fitted in intervals.values()):
        raise ValueError(intervals[min(intervals)].warning())
    scores = None
    if settings.scores != "none":
        arrays = matched_scores(ground_truth, results, min_score=settings.min_score)
        scores = fit_scores(*arrays, method=settings.scores)
    return ResultsCalibration(
        settings=settings,
        intervals=intervals,
        width_model=edges.width_model() if settings.widths == "width_model" else None,
        scores=scores,
        check=check_by_split(ground_truth, results, settings),
    )


def check_by_split(
    ground_truth: dict, results: list[dict], settings: CalibrationSettings
) -> dict[str, Any] | None:
    """Fits to half of the images and measures on the other half.

    Returns:
        None with fewer than four images with a match. Otherwise `intervals`: by kind of width, all that the results
        allow, and by coverage as text, see `klbox_jax.evaluation.interval_scores.summarize_intervals`; and `LaECE_0`:
        `before` and `after`, or None where scores stay as they are or a half has nothing to fit or measure.
    """
    edges = _matched(ground_truth, results, settings)
    if len(np.unique(edges.image_ids)) < 4:
        return None
    is_fitted = split_images(edges.image_ids, 0.5, seed=0)
    fitted, measured = edges.rows(is_fitted), edges.rows(~is_fitted)
    by_kind: dict[str, dict] = {}
    for kind in WIDTHS:
        if kind == "scaled" and edges.detected.stds is None:
            continue
        model = fitted.width_model() if kind == "width_model" else None
        scales = measured.detected.scales(kind, model)
        by_kind[kind] = {
            f"{coverage:g}": summarize_intervals(
                measured.errors,
                *_both(one.half_widths(scales, measured.detected.classes)),
                measured.image_ids,
                coverage=coverage,
                edges_at_once=1 if settings.multiplicity == "edge" else 4,
            )
            for coverage, one in _fit_all(fitted, settings, kind).items()
        }
    return {"intervals": by_kind, "LaECE_0": _check_scores(ground_truth, results, settings)}


def check_results(results: list[dict]) -> None:
    """Raises ValueError that names the first result without image, class, box or score, or with one not finite."""
    for i, entry in enumerate(results):
        for key in ("image_id", "category_id"):
            if not isinstance(entry.get(key), int | str):
                raise ValueError(f"results[{i}]: {key} must be a number or a text, not {entry.get(key)!r}")
    itself = {
        "images": [{"id": entry["image_id"]} for entry in results],
        "categories": [{"id": entry["category_id"]} for entry in results],
        "annotations": [],
    }
    check_entries(itself, results)


def _check_scores(
    ground_truth: dict, results: list[dict], settings: CalibrationSettings
) -> dict[str, float | None] | None:
    if settings.scores == "none":
        return None
    image_ids = [image["id"] for image in ground_truth["images"]]
    halves = split_images(image_ids, 0.5, seed=0).tolist()
    first = {name for name, is_first in zip(image_ids, halves, strict=True) if is_first}
    scores, ious, classes = matched_scores(
        ground_truth,
        [entry for entry in results if entry["image_id"] not in first],
        min_score=settings.min_score,
    )
    fitted = matched_scores(
        ground_truth,
        [entry for entry in results if entry["image_id"] in first],
        min_score=settings.min_score,
    )
    if not fitted[1].any() or not len(scores):
        return None
    calibrated = fit_scores(*fitted, method=settings.scores).calibrate(scores, classes)
    return {"before": laece_0(scores, ious, classes), "after": laece_0(calibrated, ious, classes)}


def _matched(ground_truth: dict, results: list[dict], settings: CalibrationSettings) -> MatchedEdges:
    return matched_edges(
        ground_truth, results, iou_threshold=settings.iou_threshold, min_score=settings.min_score
    )


def _fit_all(edges: MatchedEdges, settings: CalibrationSettings, widths: str) -> dict[float, Intervals]:
    """Returns the intervals of each coverage."""
    scales = edges.own_scales(widths) if len(edges.errors) else edges.errors
    return {
        coverage: fit_intervals(
            edges.errors,
            scales,
            edges.image_ids,
            coverage=coverage,
            multiplicity=settings.multiplicity,
            level=settings.level,
            classes=edges.detected.classes,
            missed_share=settings.missed_share,
            asymmetric=settings.asymmetric,
        )
        for coverage in sorted(settings.coverages)
    }


def _both(widths) -> tuple[Float[ndarray, "m 4"], Float[ndarray, "m 4"]]:
    """Half widths of both sides, from a pair or from those of either."""
    return widths if isinstance(widths, tuple) else (widths, widths)


def _plain(ends: Float[ndarray, "m 4"]) -> list[list[float | None]]:
    finite = np.isfinite(ends)
    rounded = np.round(np.where(finite, ends, 0.0), 4)
    return np.where(finite, rounded, None).tolist()
