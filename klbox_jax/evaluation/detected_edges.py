"""Box edges of COCO results as arrays, alone or with the errors of their matches, and the scales of their intervals."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray

from klbox_jax.evaluation.conformal import SCORES, interval_scales
from klbox_jax.evaluation.matching import TRUE_POSITIVE, corners, match_detections, numbers
from klbox_jax.evaluation.uncertainty import STD_FLOOR
from klbox_jax.evaluation.width_model import WidthModel, cross_fitted_widths, fit_width_model

WIDTHS = (*SCORES, "width_model")


@dataclasses.dataclass(frozen=True)
class DetectedEdges:
    """Detections, one row each.

    Attributes:
        boxes: `x1, y1, x2, y2` in pixels.
        stds: of the four edges in pixels, at least `STD_FLOOR`; None if the results have none.
        scores, classes: as in the results.
    """

    boxes: Float[ndarray, "n 4"]
    stds: Float[ndarray, "n 4"] | None
    scores: Float[ndarray, " n"]
    classes: Shaped[ndarray, " n"]

    def scales(self, widths: str, model: WidthModel | None = None) -> Float[ndarray, "n 4"]:
        """Returns the scale of each edge in pixels, for new detections; `model` is needed by `width_model`."""
        if widths == "width_model":
            return model.widths(self.boxes, self.scores, self.classes)
        return interval_scales(widths, self.boxes, self.stds)


@dataclasses.dataclass(frozen=True)
class MatchedEdges:
    """True positives, one row each.

    Attributes:
        detected: boxes, stds, scores and classes.
        errors: label minus prediction in pixels.
        image_ids: the data set's own.
    """

    detected: DetectedEdges
    errors: Float[ndarray, "n 4"]
    image_ids: Shaped[ndarray, " n"]

    def rows(self, keep: Bool[ndarray, " n"]) -> "MatchedEdges":
        """Returns some of the rows."""
        old = self.detected
        stds = None if old.stds is None else old.stds[keep]
        kept = DetectedEdges(old.boxes[keep], stds, old.scores[keep], old.classes[keep])
        return MatchedEdges(kept, self.errors[keep], self.image_ids[keep])

    def own_scales(self, widths: str) -> Float[ndarray, "n 4"]:
        """Returns the scales to fit intervals with on these rows; those of `width_model` are cross-fitted by image."""
        if widths == "width_model":
            return cross_fitted_widths(*self._for_width_model())
        return self.detected.scales(widths)

    def width_model(self) -> WidthModel:
        """Returns the width model of these rows, for other detections."""
        return fit_width_model(*self._for_width_model())

    def _for_width_model(self) -> tuple[ndarray, ...]:
        old = self.detected
        return self.errors, old.boxes, old.scores, old.classes, self.image_ids


def detected_edges(results: list[dict]) -> DetectedEdges:
    """Returns the edges of all results; entries are as `klbox_jax.evaluation.matching.check_entries` wants them."""
    with_stds = bool(results) and "bbox_std" in results[0]
    return DetectedEdges(
        boxes=corners(results, "bbox"),
        stds=np.maximum(numbers(results, "bbox_std"), STD_FLOOR) if with_stds else None,
        scores=np.array([entry["score"] for entry in results], np.float64),
        classes=np.array([entry["category_id"] for entry in results]),
    )


def matched_edges(
    ground_truth: dict, results: list[dict], *, iou_threshold: float, min_score: float
) -> MatchedEdges:
    """Returns the true positives; the label of an object is `bbox_noisy` where it has one, otherwise `bbox`.

    Raises:
        ValueError: see `klbox_jax.evaluation.matching.match_detections`.
    """
    matches = match_detections(
        ground_truth,
        results,
        iou_threshold=iou_threshold,
        background_iou=min(0.1, iou_threshold / 2),
        min_score=min_score,
    )
    rows = np.flatnonzero(matches.kind == TRUE_POSITIVE)
    found = [results[i] for i in matches.result_index[rows].tolist()]
    return MatchedEdges(
        detected=detected_edges(found),
        errors=matches.objects.labels[matches.object_index[rows]] - matches.boxes[rows],
        image_ids=np.array([entry["image_id"] for entry in found]),
    )
