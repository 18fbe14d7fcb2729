"""Rank correlation of score, predicted std and predicted IoU with the true IoU."""

import dataclasses

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.matching import TRUE_POSITIVE, match_detections
from klbox_jax.evaluation.ranking import spearman


@dataclasses.dataclass(frozen=True)
class LocalizationConfidences:
    """Measures of confidence of the true positives, and their IoUs.

    Attributes:
        ious: with the matched object's `bbox`, which is the exact box if the data set has one.
        scores: of the detections.
        relative_stds: mean over the four edges of std / side, where side is the box's extent across the edge; None
            without stds.
        predicted_ious: of an IoU head; None unless every result has a `predicted_iou`.
    """

    ious: Float[ndarray, " n"]
    scores: Float[ndarray, " n"]
    relative_stds: Float[ndarray, " n"] | None
    predicted_ious: Float[ndarray, " n"] | None

    def spearman(self) -> dict[str, float | None]:
        """Returns the rank correlation of each measure with the IoU; it is negative for a good std."""
        values = {
            "score": self.scores,
            "relative_std": self.relative_stds,
            "predicted_iou": self.predicted_ious,
        }
        return {name: None if found is None else spearman(found, self.ious) for name, found in values.items()}


def localization_confidences(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5, min_score: float = 0.0
) -> LocalizationConfidences:
    """Returns measures of confidence of the true positives; arguments and errors are those of `match_detections`."""
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold, min_score=min_score)
    rows = np.flatnonzero(matches.kind == TRUE_POSITIVE)
    boxes = matches.boxes[rows]
    sides = np.tile(np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0), 2)
    has_predicted_ious = bool(results) and all("predicted_iou" in entry for entry in results)
    found = [results[index] for index in matches.result_index[rows]]
    return LocalizationConfidences(
        ious=matches.iou[rows],
        scores=matches.scores[rows],
        relative_stds=None if matches.stds is None else (matches.stds[rows] / sides).mean(axis=1),
        predicted_ious=np.array([entry["predicted_iou"] for entry in found], np.float64)
        if has_predicted_ious
        else None,
    )
