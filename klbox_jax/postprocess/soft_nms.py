"""Hard NMS and soft-NMS (Bodla et al., ICCV 2017) as factors on the scores of overlapping boxes."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.greedy_suppression import SuppressionResult
from klbox_jax.postprocess.greedy_suppression_by_class import greedy_suppression_by_class

SOFT_NMS_METHODS = ("linear", "gaussian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardNMS:
    """Removes a box whose IoU with a better kept box is above the threshold (strictly); other scores stay.

    Attributes:
        iou_threshold: largest IoU that two kept boxes of one class may have.
    """

    iou_threshold: float = 0.5

    def __post_init__(self):
        _check_share("HardNMS", iou_threshold=self.iou_threshold)

    @property
    def min_score(self) -> float:
        """Keeps any positive score."""
        return float(jnp.finfo(jnp.float32).tiny)

    def __call__(self, iou: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Returns 0 above the threshold, otherwise 1."""
        return jnp.where(iou > self.iou_threshold, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftNMS:
    """Lowers the score of a box by its IoU with a better box (Bodla et al., ICCV 2017).

    Attributes:
        method: `linear` multiplies by `1 - IoU` where `IoU >= iou_threshold`; `gaussian` by `exp(-IoU^2 / sigma)`
            everywhere.
        sigma: width of the Gaussian.
        iou_threshold: IoU from which the linear decay starts.
        min_score: a box is dropped once its score is below this (a score equal to it stays).

    Raises:
        ValueError: for an unknown method or a number out of range.
    """

    method: str = "gaussian"
    sigma: float = 0.5
    iou_threshold: float = 0.3
    min_score: float = 0.001

    def __post_init__(self):
        if self.method not in SOFT_NMS_METHODS:
            raise ValueError(f"Unknown soft-NMS method {self.method!r}; choose 'linear' or 'gaussian'.")
        _check_share("SoftNMS", iou_threshold=self.iou_threshold, min_score=self.min_score)
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"SoftNMS needs a positive, finite sigma, got {self.sigma}.")

    def __call__(self, iou: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Returns the factor on the score, in [0, 1]."""
        if self.method == "linear":
            return jnp.where(iou >= self.iou_threshold, 1.0 - iou, 1.0)
        return jnp.exp(-jnp.square(iou) / self.sigma)


def soft_nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    valid: Bool[Array, " N"],
    *,
    method: str,
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    min_score: float = 0.001,
    max_outputs: int,
) -> SuppressionResult:
    """Picks the best box, lowers the scores of the boxes of its class that overlap it, and repeats.

    Args:
        boxes: in one space, any unit.
        scores: not negative.
        classes: only boxes of one class lower each other.
        valid: False rows are neither picked nor counted.
        method, sigma, iou_threshold, min_score: fields of `SoftNMS`.
        max_outputs: number of picks.

    Returns:
        `max_outputs` slots, scores not increasing; equal scores rank by row.

    Raises:
        ValueError: for an unknown method or a number out of range.
    """
    candidates = Candidates(boxes=boxes, scores=scores, classes=classes, valid=valid)
    decay = SoftNMS(method=method, sigma=sigma, iou_threshold=iou_threshold, min_score=min_score)
    return greedy_suppression_by_class(candidates, decay, max_outputs=max_outputs)


def _check_share(name: str, **values: float) -> None:
    for field, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} needs {field} in [0, 1], got {value}.")
