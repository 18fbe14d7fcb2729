"""Maps class scores to calibrated ones, after training: the expected IoU of the detection with its object.

The target of a detection is the IoU of its match and 0 for a false positive, so that a calibrated score says how much
of the box is expected to be right (Kuzucu et al., ECCV 2024). Fit on the detections that will be shown: the same score
threshold and post-processing.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from klbox_jax.evaluation.array_checks import choice, class_ids, numbers, shares
from klbox_jax.evaluation.by_class import from_lists, from_pairs, to_lists, to_pairs

METHODS = ("isotonic", "platt", "linear", "temperature")
# A class with fewer detections, or fewer matches among them, uses the curve of all classes.
MIN_DETECTIONS, MIN_MATCHES = 50, 10
# Share of the uncalibrated score in the calibrated one: it keeps the order of scores where a curve is flat.
TIE_BREAK = 1e-4
# Logits are finite from here on.
_SCORE_MARGIN = 1e-7
_NEWTON_STEPS = 100
# Weight of the squared distance to slope 1 and intercept 0 in the loss of the logistic fits.
_PULL = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreCalibration:
    """Fitted curves from score to expected IoU.

    Attributes:
        method: as given to `fit_scores`.
        curve: of all classes together. `isotonic`: scores of the knots in row 0, their values in row 1. Otherwise slope
            and intercept, of the score (`linear`) or of its logit.
        class_curves: of each class that has enough detections.
        pooled_classes: classes of the calibration set that use `curve`.
        num_detections: that the curves were fitted to.
    """

    method: str
    curve: Float[ndarray, "2 k"]
    class_curves: dict[int | str, Float[ndarray, "2 _"]]
    pooled_classes: tuple[int | str, ...]
    num_detections: int

    def calibrate(self, scores: ArrayLike, classes: ArrayLike) -> Float[ndarray, " n"]:
        """Returns calibrated scores, from 0 to 1; a class that was not fitted has the curve of all.

        Within a class equal scores stay equal and others keep their order, so average precision does not change.

        Args:
            scores: [n], from 0 to 1.
            classes: [n], whole numbers or texts.
        """
        scores = shares("scores", scores)
        classes = class_ids("classes", classes, len(scores))
        found = _apply(self.method, self.curve, scores)
        for name in np.unique(classes).tolist():
            if name in self.class_curves:
                own = classes == name
                found[own] = _apply(self.method, self.class_curves[name], scores[own])
        return (1 - TIE_BREAK) * found + TIE_BREAK * scores

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and texts for JSON."""
        return dataclasses.asdict(self) | {
            "curve": to_lists(self.curve),
            "class_curves": to_pairs(self.class_curves),
            "pooled_classes": list(self.pooled_classes),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ScoreCalibration":
        """Returns the record that `to_dict` wrote."""
        return cls(
            **fields
            | {
                "curve": from_lists(fields["curve"]),
                "class_curves": from_pairs(fields["class_curves"]),
                "pooled_classes": tuple(fields["pooled_classes"]),
            }
        )


def fit_scores(scores: ArrayLike, ious: ArrayLike, classes: ArrayLike, *, method: str) -> ScoreCalibration:
    """Fits a nondecreasing curve from score to IoU for each class, and one for all classes together.

    Args:
        scores: [n], from 0 to 1, of all detections.
        ious: [n], with the matched object; 0 for a false positive.
        classes: [n], whole numbers or texts.
        method: `isotonic`: the nondecreasing curve of least squares, linear between its steps. `linear`: least
            squares, cut to 0 to 1. `platt`: sigmoid of slope x logit + intercept, by cross-entropy with the IoU as
            target. `temperature`: the same without intercept. Slopes are not negative.

    Raises:
        ValueError: the method is unknown, arrays do not fit each other, values are outside 0 to 1, or no detection
            matches an object.
    """
    choice("method", method, METHODS)
    scores = shares("scores", scores)
    ious = shares("ious", ious, len(scores))
    classes = class_ids("classes", classes, len(scores))
    if not ious.any():
        raise ValueError(
            f"none of the {len(scores)} detections matches an object, so there is no IoU to calibrate scores to; check "
            "that the results and the annotations are of the same images and categories"
        )
    class_curves, pooled_classes = {}, []
    for name in np.unique(classes).tolist():
        own = classes == name
        if own.sum() < MIN_DETECTIONS or np.count_nonzero(ious[own]) < MIN_MATCHES:
            pooled_classes.append(name)
        else:
            class_curves[name] = _fit(method, scores[own], ious[own])
    return ScoreCalibration(
        method=method,
        curve=_fit(method, scores, ious),
        class_curves=class_curves,
        pooled_classes=tuple(pooled_classes),
        num_detections=len(scores),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """Fitted quality of a box given its relative std: a nonincreasing curve.

    Attributes:
        iou_threshold: as given to `fit_quality`.
        knots: relative stds in row 0, qualities in row 1.
    """

    iou_threshold: float | None
    knots: Float[ndarray, "2 k"]

    def factors(self, relative_stds: ArrayLike) -> Float[ndarray, " n"]:
        """Returns what to multiply each score with, above 0 and at most 1; strictly decreasing in the relative std."""
        relative_stds = numbers("relative_stds", relative_stds)
        found = np.interp(relative_stds, *self.knots)
        return (1 - TIE_BREAK) * found + TIE_BREAK / (1 + relative_stds)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers for JSON."""
        return {"iou_threshold": self.iou_threshold, "knots": to_lists(self.knots)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Quality":
        """Returns the record that `to_dict` wrote."""
        return cls(fields["iou_threshold"], from_lists(fields["knots"]))


def fit_quality(relative_stds: ArrayLike, ious: ArrayLike, *, iou_threshold: float | None) -> Quality:
    """Fits the quality of a box as a nonincreasing function of its relative std, by isotonic regression.

    The fitted form of `config.postprocess.score_by_std`. Fit it to true positives at IoU 0.5: with false positives the
    factor would repeat what the score says already. A steep factor outweighs the score: on the scenes the expected
    IoU raises AP by 0.2 to 0.4, and P(IoU > 0.75) lowers it by 1 to 2 (docs/intervals.md).

    Args:
        relative_stds: [n], mean over the four edges of sigma / side of the predicted box; not negative.
        ious: [n], with the matched object.
        iou_threshold: t from 0 to below 1 for P(IoU > t given the relative std); None for the expected IoU.

    Raises:
        ValueError: there is no detection, or values are out of range.
    """
    relative_stds = numbers("relative_stds", relative_stds)
    ious = shares("ious", ious, len(relative_stds))
    if not len(ious):
        raise ValueError("there is no matched detection, so there is no quality to fit")
    if (relative_stds < 0).any():
        raise ValueError(f"relative_stds has {relative_stds.min()}; a std is 0 or more")
    if iou_threshold is not None:
        if not 0 <= iou_threshold < 1:
            raise ValueError(
                f"iou_threshold = {iou_threshold} must be from 0 to below 1, such as 0.75, or None"
            )
        ious = (ious > iou_threshold).astype(np.float64)
    return Quality(iou_threshold, isotonic_knots(relative_stds, ious, increasing=False))


def isotonic_knots(
    x: Float[ndarray, " n"], y: Float[ndarray, " n"], *, increasing: bool = True
) -> Float[ndarray, "2 k"]:
    """Fits the monotone curve of least squares, and returns the ends of its steps: x in row 0, values in row 1.

    Equal x share one value. Between steps, `numpy.interp` of the knots is linear; outside it is constant.
    """
    from scipy.optimize import isotonic_regression  # here: it takes as long to import as all of evaluation

    places, index, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(index, y) / counts
    values = isotonic_regression(means, weights=counts, increasing=increasing).x
    is_end = np.ones(len(values), bool)
    is_end[1:-1] = (values[1:-1] != values[:-2]) | (values[1:-1] != values[2:])
    return np.stack([places[is_end], values[is_end]])


def _fit(method: str, scores: Float[ndarray, " n"], ious: Float[ndarray, " n"]) -> Float[ndarray, "2 k"]:
    if method == "isotonic":
        return isotonic_knots(scores, ious)
    if method == "linear":
        centred = scores - scores.mean()
        square = (centred**2).sum()
        slope = max((centred * ious).sum() / square, 0.0) if square else 0.0
        return np.array([[slope], [ious.mean() - slope * scores.mean()]])
    return _fit_logistic(_logits(scores), ious, has_intercept=method == "platt")


def _fit_logistic(
    logits: Float[ndarray, " n"], targets: Float[ndarray, " n"], *, has_intercept: bool
) -> Float[ndarray, "2 1"]:
    """Slope and intercept of the smallest mean cross-entropy, by Newton's method; a slight pull keeps them finite.

    Where the slope would be negative it is 0, which is then the best one: the loss is convex.
    """
    design = np.stack([logits, np.ones_like(logits)], axis=1)[:, : 1 + has_intercept]
    start = np.array([1.0, 0.0])[: 1 + has_intercept]

    def loss(parameters: Float[ndarray, " p"]) -> float:
        z = design @ parameters
        return np.mean(np.logaddexp(0.0, z) - targets * z) + _PULL * ((parameters - start) ** 2).sum()

    parameters, best = start, loss(start)
    for _ in range(_NEWTON_STEPS):
        means = expit(design @ parameters)
        slopes = design.T @ (means - targets) / len(logits) + 2 * _PULL * (parameters - start)
        curvature = (design * (means * (1 - means))[:, None]).T @ design / len(logits)
        step = np.linalg.solve(curvature + 2 * _PULL * np.eye(len(start)), slopes)
        while (value := loss(parameters - step)) > best and np.abs(step).max() > 1e-9:
            step = step / 2
        if value >= best:
            break
        parameters, best = parameters - step, value
    slope, intercept = float(parameters[0]), float(parameters[1]) if has_intercept else 0.0
    if slope < 0:
        slope, intercept = 0.0, float(_logits(targets[None].mean(axis=1))[0]) if has_intercept else 0.0
    return np.array([[slope], [intercept]])


def _apply(method: str, curve: Float[ndarray, "2 k"], scores: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    if method == "isotonic":
        return np.interp(scores, *curve)
    slope, intercept = curve[:, 0]
    if method == "linear":
        return np.clip(slope * scores + intercept, 0.0, 1.0)
    return expit(slope * _logits(scores) + intercept)


def _logits(scores: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    return logit(np.clip(scores, _SCORE_MARGIN, 1 - _SCORE_MARGIN))
