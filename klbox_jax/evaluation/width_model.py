"""A width for each edge of a detection without sigma, from its box, score and class: a scale for conformal intervals.

    width = side^p g(score) k(class, edge)

in pixels, where the side is the extent of the box across the edge. g falls with the score and is fitted by isotonic
regression; p, from 0 (errors do not grow with the object) to 1 (errors in proportion to it), is the one of the largest
Laplace likelihood on images that were left out; k is a ratio of mean errors, drawn towards that of all classes where a
class has few labels. In expectation a width is the mean absolute error. NumPy only.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike

from klbox_jax.evaluation.array_checks import class_ids, edge_rows, identities, numbers
from klbox_jax.evaluation.by_class import from_lists, from_pairs, rows_of_classes, to_lists, to_pairs
from klbox_jax.evaluation.score_calibration import isotonic_knots

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_FOLDS = 5
# Mean errors are taken over bins of the score with at least so many labels, in at most so many bins.
_LABELS_PER_BIN, _MAX_BINS = 30, 20
# A class counts as if it had so many labels more, with the errors of all classes.
_PRIOR_LABELS = 20
_MIN_WIDTH = 0.01  # pixels; a width of 0 would promise that an edge has no error


@dataclasses.dataclass(frozen=True, eq=False)
class WidthModel:
    """Fitted widths.

    Attributes:
        exponent: p.
        knots: scores in row 0, values of g in row 1; linear between them.
        edge_factors: k of a class that was not fitted.
        class_factors: k of each class.
        num_labels, num_images: what it was fitted to.
    """

    exponent: float
    knots: Float[ndarray, "2 k"]
    edge_factors: Float[ndarray, "4"]
    class_factors: dict[int | str, Float[ndarray, "4"]]
    num_labels: int
    num_images: int

    def widths(self, boxes: ArrayLike, scores: ArrayLike, classes: ArrayLike) -> Float[ndarray, "n 4"]:
        """Returns the width of each edge in pixels: positive, and not larger for a higher score.

        Args:
            boxes: [n, 4], `x1, y1, x2, y2` in pixels.
            scores: [n].
            classes: [n], whole numbers or texts.
        """
        boxes = edge_rows("boxes", boxes)
        scores = numbers("scores", scores, len(boxes))
        classes = class_ids("classes", classes, len(boxes))
        factors = rows_of_classes(self.edge_factors, self.class_factors, classes)
        levels = _sides(boxes) ** self.exponent * np.interp(scores, *self.knots)[:, None]
        return np.maximum(levels * factors, _MIN_WIDTH)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers for JSON."""
        return dataclasses.asdict(self) | {
            "knots": to_lists(self.knots),
            "edge_factors": to_lists(self.edge_factors),
            "class_factors": to_pairs(self.class_factors),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "WidthModel":
        """Returns the record that `to_dict` wrote."""
        return cls(
            **fields
            | {
                "knots": from_lists(fields["knots"]),
                "edge_factors": from_lists(fields["edge_factors"]),
                "class_factors": from_pairs(fields["class_factors"]),
            }
        )


@dataclasses.dataclass(frozen=True)
class _Matches:
    """Checked arrays of matched detections; images are numbered from 0."""

    errors: Float[ndarray, "n 4"]
    boxes: Float[ndarray, "n 4"]
    scores: Float[ndarray, " n"]
    classes: ndarray
    images: ndarray

    def rows(self, keep: ndarray) -> "_Matches":
        return _Matches(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


def fit_width_model(
    errors: ArrayLike, boxes: ArrayLike, scores: ArrayLike, classes: ArrayLike, image_ids: ArrayLike
) -> WidthModel:
    """Fits widths to matched detections of calibration images.

    Args:
        errors: [n, 4], label minus prediction, in pixels.
        boxes: [n, 4], as predicted, `x1, y1, x2, y2`.
        scores: [n].
        classes: [n], whole numbers or texts.
        image_ids: [n]; p is chosen by leaving out images, a fifth at a time.

    Raises:
        ValueError: there are no matches or fewer than two images, or arrays do not fit each other.
    """
    matches = _checked(errors, boxes, scores, classes, image_ids)
    return _fit(matches, _best_exponent(matches))


def cross_fitted_widths(
    errors: ArrayLike, boxes: ArrayLike, scores: ArrayLike, classes: ArrayLike, image_ids: ArrayLike
) -> Float[ndarray, "n 4"]:
    """Returns the width of each edge from models that have not seen the image of the edge; arguments as for a fit.

    These are the scales to fit intervals with on the images that the model itself is fitted to. Widths of the model on
    its own images are too small there, and intervals that are fitted with them cover too little elsewhere.
    """
    matches = _checked(errors, boxes, scores, classes, image_ids)
    widths = np.empty_like(matches.errors)
    for left_out in _folds(matches):
        train, test = matches.rows(~left_out), matches.rows(left_out)
        exponent = _best_exponent(train) if len(np.unique(train.images)) > 1 else 0.5
        widths[left_out] = _fit(train, exponent).widths(test.boxes, test.scores, test.classes)
    return widths


def _checked(
    errors: ArrayLike, boxes: ArrayLike, scores: ArrayLike, classes: ArrayLike, image_ids: ArrayLike
) -> _Matches:
    errors = edge_rows("errors", errors)
    if not len(errors):
        raise ValueError(
            "there is no matched detection to fit widths to; lower the score threshold, or check that the results and "
            "the annotations are of the same images"
        )
    count = len(errors)
    names, images = np.unique(identities("image_ids", image_ids, count), return_inverse=True)
    if len(names) < 2:
        raise ValueError("widths are fitted by leaving out images, and there is one image; give two or more")
    return _Matches(
        errors=errors,
        boxes=edge_rows("boxes", boxes, count),
        scores=numbers("scores", scores, count),
        classes=class_ids("classes", classes, count),
        images=images,
    )


def _folds(matches: _Matches) -> list[ndarray]:
    """Rows of each of up to `NUM_FOLDS` parts of the images."""
    names = np.unique(matches.images)
    order = np.random.default_rng(0).permutation(names)
    return [np.isin(matches.images, part) for part in np.array_split(order, min(NUM_FOLDS, len(names)))]


def _best_exponent(matches: _Matches) -> float:
    """The exponent of the smallest mean of log width + |error| / width over images that are left out."""
    losses = np.zeros(len(EXPONENTS))
    for left_out in _folds(matches):
        train, test = matches.rows(~left_out), matches.rows(left_out)
        for i, exponent in enumerate(EXPONENTS):
            widths = _fit(train, exponent).widths(test.boxes, test.scores, test.classes)
            losses[i] += (np.log(widths) + np.abs(test.errors) / widths).sum()
    return EXPONENTS[int(np.argmin(losses))]


def _fit(matches: _Matches, exponent: float) -> WidthModel:
    relative = np.abs(matches.errors) / _sides(matches.boxes) ** exponent
    order = np.argsort(matches.scores, kind="stable")
    num_bins = min(max(len(order) // _LABELS_PER_BIN, 1), _MAX_BINS)
    bins = np.array_split(order, num_bins)
    knots = isotonic_knots(
        np.array([matches.scores[rows].mean() for rows in bins]),
        np.array([relative[rows].mean() for rows in bins]),
        increasing=False,
    )
    knots[1] = np.maximum(knots[1], 1e-12)
    ratios = relative / np.interp(matches.scores, *knots)[:, None]
    edge_factors = ratios.mean(axis=0)
    names, index, counts = np.unique(matches.classes, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(index, column) for column in ratios.T], axis=1)
    own_factors = (sums + _PRIOR_LABELS * edge_factors) / (counts[:, None] + _PRIOR_LABELS)
    return WidthModel(
        exponent=exponent,
        knots=knots,
        edge_factors=edge_factors,
        class_factors=dict(zip(names.tolist(), own_factors, strict=True)),
        num_labels=len(ratios),
        num_images=len(np.unique(matches.images)),
    )


def _sides(boxes: Float[ndarray, "n 4"]) -> Float[ndarray, "n 4"]:
    return np.tile(np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0), 2)
