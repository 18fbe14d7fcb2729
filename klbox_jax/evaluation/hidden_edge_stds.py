"""Comparison of the stds of hidden (occluded or blurred) and clear edges within one box."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from klbox_jax.evaluation.matching import TRUE_POSITIVE, Matches


@dataclasses.dataclass(frozen=True)
class EdgePairs:
    """Mean stds of the clear and of the other edges of each box, in pixels.

    Holds only boxes that have both kinds of edges.

    Attributes:
        clear, other: means of the predicted stds.
        true_clear, true_other: means of the true stds of the label noise.
    """

    clear: Float[ndarray, " n"]
    other: Float[ndarray, " n"]
    true_clear: Float[ndarray, " n"]
    true_other: Float[ndarray, " n"]

    def summary(self) -> dict[str, float | int | None]:
        """Returns the number of boxes, the share with larger stds at the other edges, and median std ratios."""
        if not len(self.clear):
            return {"num": 0, "share_larger": None, "median_ratio": None, "true_median_ratio": None}
        return {
            "num": len(self.clear),
            "share_larger": float(np.mean(self.other > self.clear)),
            "median_ratio": float(np.median(self.other / self.clear)),
            "true_median_ratio": float(np.median(self.true_other / self.true_clear)),
        }


def pair_edges(matches: Matches, clear: Bool[ndarray, "g 4"], other: Bool[ndarray, "g 4"]) -> EdgePairs:
    """Pairs two kinds of edges within each true positive.

    Args:
        matches: detections with stds, of a ground truth with true stds.
        clear: marks the clear edges of each object, in the order of `matches.objects`.
        other: marks the edges to compare with them.
    """
    rows = np.flatnonzero(matches.kind == TRUE_POSITIVE)
    objects = matches.object_index[rows]
    has_both = clear[objects].any(axis=1) & other[objects].any(axis=1)
    rows, objects = rows[has_both], objects[has_both]

    def mean_over(stds: Float[ndarray, "n 4"], chosen: Bool[ndarray, "n 4"]) -> Float[ndarray, " n"]:
        return np.where(chosen, stds, 0.0).sum(axis=1) / chosen.sum(axis=1)

    stds, true_stds = matches.stds[rows], matches.objects.label_stds[objects]
    return EdgePairs(
        clear=mean_over(stds, clear[objects]),
        other=mean_over(stds, other[objects]),
        true_clear=mean_over(true_stds, clear[objects]),
        true_other=mean_over(true_stds, other[objects]),
    )
