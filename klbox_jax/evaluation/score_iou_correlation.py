"""How well what a detection says of itself agrees with how well it fits: scores and stds against the IoU."""

import dataclasses

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.matching import TRUE_POSITIVE, match_detections
from klbox_jax.evaluation.ranking import spearman


@dataclasses.dataclass(frozen=True)
class Agreement:
    """True positives, each as a point.

    Attributes:
        ious: with the object, as `bbox` has it: the exact box where there is one.
        scores: of the detections.
        relative_stds: mean over the four edges of std / side, the side being the detection's extent across the edge;
            None for detections without stds.
        predicted_ious: the IoUs that an IoU head foretold, where every result has a `predicted_iou`; otherwise None.
    """

    ious: Float[ndarray, " n"]
    scores: Float[ndarray, " n"]
    relative_stds: Float[ndarray, " n"] | None
    predicted_ious: Float[ndarray, " n"] | None

    def spearman(self) -> dict[str, float | None]:
        """Returns the rank correlation of each with the IoU; a good std has a negative one."""
        values = {
            "score": self.scores,
            "relative_std": self.relative_stds,
            "predicted_iou": self.predicted_ious,
        }
        return {name: None if found is None else spearman(found, self.ious) for name, found in values.items()}


def matched_agreement(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5, min_score: float = 0.0
) -> Agreement:
    """Returns the true positives of a results list; arguments and errors as for `match_detections`."""
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold, min_score=min_score)
    rows = np.flatnonzero(matches.kind == TRUE_POSITIVE)
    boxes = matches.boxes[rows]
    sides = np.tile(np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0), 2)
    foretold = bool(results) and all("predicted_iou" in entry for entry in results)
    found = [results[index] for index in matches.result_index[rows]]
    return Agreement(
        ious=matches.iou[rows],
        scores=matches.scores[rows],
        relative_stds=None if matches.stds is None else (matches.stds[rows] / sides).mean(axis=1),
        predicted_ious=np.array([entry["predicted_iou"] for entry in found], np.float64)
        if foretold
        else None,
    )
