"""Calibration of one detector: intervals of its box edges at any coverage, and scores that are expected IoUs.

The conformal score is |label - prediction| / sigma with the sigma of the network, before any temperature. A temperature
is fitted to the same boxes, and scales that depend on the calibration boxes would make the promise inexact.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from klbox_jax.evaluation.array_checks import class_ids, edge_rows, numbers
from klbox_jax.evaluation.conformal import fit_intervals
from klbox_jax.evaluation.detected_edges import matched_edges
from klbox_jax.evaluation.intervals import Intervals
from klbox_jax.evaluation.matching import corners
from klbox_jax.evaluation.matching import numbers as edge_numbers
from klbox_jax.evaluation.score_calibration import ScoreCalibration, fit_scores
from klbox_jax.evaluation.score_calibration_error import matched_scores
from klbox_jax.evaluation.uncertainty import STD_FLOOR

IOU_THRESHOLD = 0.5
COVERAGES = (0.5, 0.8, 0.9, 0.95)
SCORE_METHOD = "isotonic"
# Coverage of the intervals in JSON files.
FILE_COVERAGE = 0.9
FILE_KEY = f"bbox_interval_{100 * FILE_COVERAGE:g}"


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeCalibration:
    """Matched detections of the calibration images, from which intervals of any coverage follow exactly.

    Attributes:
        ratios: largest |label - prediction| / sigma over the four edges of each box.
        scores, classes: of these detections; classes are the data set's category ids.
        images: number of the image of each box, from 0.
        score_curves: maps scores to expected IoUs.
        iou_threshold: least IoU of a match.
        data: name of the calibration images.
        temperature: factors that the stds given to `half_widths` were multiplied with.
    """

    ratios: Float[ndarray, " n"]
    scores: Float[ndarray, " n"]
    classes: Shaped[ndarray, " n"]
    images: Int[ndarray, " n"]
    score_curves: ScoreCalibration
    iou_threshold: float
    data: str
    temperature: Float[ndarray, "4"] = dataclasses.field(default_factory=lambda: np.ones(4))

    def intervals(self, coverage: float, *, level: str = "box", min_score: float = 0.0) -> Intervals:
        """Returns the fitted intervals; multiples of sigma, the same for the four edges of a box.

        Args:
            coverage: between 0 and 1.
            level: `box`, `class`, `image` or `image_mean`, see `fit_intervals`.
            min_score: fit to boxes of this score or more, for a promise on such boxes. The matches are the same as
                those of a results file without the others, because better scores choose their object first.

        Raises:
            ValueError: see `fit_intervals`.
        """
        return _fitted(self, coverage, level, min_score)

    def half_widths(
        self, intervals: Intervals, stds: ArrayLike, classes: ArrayLike | None = None
    ) -> Float[ndarray, "m 4"]:
        """Returns the half width of each edge's interval, in the unit of the stds.

        Args:
            intervals: from `self.intervals`.
            stds: [m, 4], of detections; those below `STD_FLOOR` are raised to it.
            classes: [m], category ids; needed by level `class`.
        """
        scales = np.maximum(edge_rows("stds", stds) / self.temperature, STD_FLOOR)
        return intervals.half_widths(scales, classes)

    def calibrated_scores(self, scores: ArrayLike, classes: ArrayLike) -> Float[ndarray, " m"]:
        """Returns the expected IoU of detections with these scores and category ids."""
        return self.score_curves.calibrate(np.clip(numbers("scores", scores), 0.0, 1.0), classes)

    def promise(self, intervals: Intervals, *, min_score: float = 0.0) -> str:
        """Returns the promise of fitted intervals with everything it is conditional on, in one sentence."""
        shown = f"scores of {min_score:g} or more" if min_score else "every score of this post-processing"
        return (
            f"{intervals.promise().removesuffix('.')} (a match has an IoU of {self.iou_threshold:g} or more; {shown}; "
            f"fitted to {intervals.num_labels} boxes of {intervals.num_images} images of {self.data})."
        )

    def file_promise(self) -> str:
        """Returns the promise of the intervals in files, or why they are null."""
        fitted = self.intervals(FILE_COVERAGE)
        return f"{FILE_KEY}: {fitted.warning() or self.promise(fitted)}"

    def with_intervals(self, results: list[dict]) -> list[dict]:
        """Returns COCO results with `bbox_interval_90` and `score_calibrated`.

        `bbox_interval_90` has `lower` and `upper`, the ends of the intervals of `x1, y1, x2, y2` in pixels; None where
        they are infinite, because there are too few labels.
        """
        if not results:
            return []
        boxes, classes = corners(results, "bbox"), np.array([entry["category_id"] for entry in results])
        half = self.half_widths(self.intervals(FILE_COVERAGE), edge_numbers(results, "bbox_std"))
        lower, upper = plain_ends(boxes - half), plain_ends(boxes + half)
        scores = self.calibrated_scores([entry["score"] for entry in results], classes)
        return [
            entry | {FILE_KEY: {"lower": low, "upper": high}, "score_calibrated": score}
            for entry, low, high, score in zip(results, lower, upper, scores.tolist(), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and texts for JSON, without the temperature."""
        arrays = {name: getattr(self, name).tolist() for name in ("ratios", "scores", "classes", "images")}
        return arrays | {
            "score_curves": self.score_curves.to_dict(),
            "iou_threshold": self.iou_threshold,
            "data": self.data,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "EdgeCalibration":
        """Returns the record that `to_dict` wrote; raises KeyError, TypeError or ValueError if it is another."""
        count = len(fields["ratios"])
        arrays = {name: numbers(name, fields[name], count) for name in ("ratios", "scores")}
        if (arrays["ratios"] < 0).any():
            raise ValueError("ratios has a negative number")
        return cls(
            **arrays,
            classes=class_ids("classes", fields["classes"], count),
            images=class_ids("images", fields["images"], count),
            score_curves=ScoreCalibration.from_dict(fields["score_curves"]),
            iou_threshold=float(fields["iou_threshold"]),
            data=str(fields["data"]),
        )


def fit_edge_calibration(ground_truth: dict, results: list[dict], *, data: str) -> EdgeCalibration:
    """Fits the intervals and scores of one detector to its detections in calibration images.

    Args:
        ground_truth: COCO dictionary of images that are used neither for training nor for reported numbers; the label
            of an object is `bbox_noisy` where it has one, otherwise `bbox`.
        results: detections with `bbox_std`, as they leave the network.
        data: name of the images.

    Raises:
        ValueError: an entry is wrong (see `check_entries`), or nothing matches.
    """
    edges = matched_edges(ground_truth, results, iou_threshold=IOU_THRESHOLD, min_score=0.0)
    if not len(edges.errors):
        raise ValueError(
            "no detection matches an object of the calibration set; train longer, then calibrate"
        )
    return EdgeCalibration(
        ratios=(np.abs(edges.errors) / edges.detected.stds).max(axis=1),
        scores=edges.detected.scores,
        classes=class_ids("category_id", edges.detected.classes, len(edges.errors)),
        images=np.unique(edges.image_ids, return_inverse=True)[1],
        score_curves=fit_scores(*matched_scores(ground_truth, results), method=SCORE_METHOD),
        iou_threshold=IOU_THRESHOLD,
        data=data,
    )


def plain_ends(ends: Float[ndarray, "m 4"]) -> list[list[float | None]]:
    """Returns coordinates for JSON, in ten-thousandths of a pixel; infinity is None."""
    finite = np.isfinite(ends)
    rounded = np.round(np.where(finite, ends, 0.0), 4)
    return np.where(finite, rounded, None).tolist()


# Fitted once for a coverage: a detector asks for the same intervals image after image.
@functools.lru_cache(maxsize=32)
def _fitted(calibration: EdgeCalibration, coverage: float, level: str, min_score: float) -> Intervals:
    keep = calibration.scores >= min_score
    ratios = np.repeat(calibration.ratios[keep][:, None], 4, axis=1)
    return fit_intervals(
        ratios,
        np.ones_like(ratios),
        calibration.images[keep],
        coverage=coverage,
        level=level,
        classes=calibration.classes[keep],
    )
