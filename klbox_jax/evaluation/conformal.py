"""Split conformal prediction of box edges: intervals whose coverage is promised for finite samples.

An interval of an edge is the prediction plus or minus a quantile times the scale of that edge. The quantile is an order
statistic of |error| / scale on calibration images. The choice of the scale is the choice of the conformal score: sigma
(`scaled`), one pixel (`additive`) or the side of the box (`multiplicative`). Nothing is assumed of the errors'
distribution, and nothing is retrained. docs/intervals.md says what the promise depends on.

Arrays are NumPy, edges are in the order `x1, y1, x2, y2`, errors and scales in pixels of one image space.
"""

import dataclasses
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.typing import ArrayLike

from klbox_jax.evaluation import conformal_quantiles as quantiles
from klbox_jax.evaluation.array_checks import choice, class_ids, edge_rows, identities, positive_edge_rows
from klbox_jax.evaluation.conformal_quantiles import MULTIPLICITIES, exact_fraction
from klbox_jax.evaluation.intervals import OUTWARD, Intervals

SCORES = ("scaled", "additive", "multiplicative")
LEVELS = ("box", "class", "image", "image_mean")


def fit_intervals(
    errors: ArrayLike,
    scales: ArrayLike,
    image_ids: ArrayLike,
    *,
    coverage: float,
    multiplicity: str = "max",
    level: str = "box",
    classes: ArrayLike | None = None,
    missed_share: float = 0.0,
    asymmetric: bool = False,
) -> Intervals:
    """Fits the quantiles of split conformal prediction to matched detections of calibration images.

    The rank is ceil((n + 1) coverage), in whole numbers; where it exceeds n, the intervals are infinite.

    Args:
        errors: [n, 4], label minus prediction.
        scales: [n, 4], positive: sigmas, ones or sides, see `interval_scales`.
        image_ids: [n], numbers or texts.
        coverage: between 0 and 1.
        multiplicity: how four edges share the miss probability a = 1 - coverage. `max`: one quantile of the largest
            of the four ratios. `bonferroni`: a / 4 each. `sidak`: coverage^(1/4) each, for independent edges.
            `max_rank`: quantiles of equal rank, for edges whose scales do not compare. `edge`: each edge by itself, a
            promise for an edge and not for a box.
        level: `box`: a share of boxes. `class`: a share of the boxes of each class; one with too few labels uses the
            quantile of all. `image`: a share of images has all of its boxes inside, or all but `missed_share` of them.
            `image_mean`: the share of an image's boxes that are inside, on average over images, by conformal risk
            control; valid where boxes of an image are alike, unlike `box`.
        classes: [n], whole numbers or texts, for level `class`.
        missed_share: from 0 to below 1, for level `image`.
        asymmetric: True for an outer and an inner quantile, each with a / 2: errors that move an edge out of the box
            are apart from those that move it in. The outer box then contains the label with 1 - a / 2.

    Raises:
        ValueError: nothing to fit, wrong shapes, values that are not finite, a scale that is not positive, an
            unknown choice, or a coverage that is not between 0 and 1.
    """
    errors = edge_rows("errors", errors)
    if not len(errors):
        raise ValueError(
            "there is no matched detection to fit intervals to; lower the score threshold, check that the results and "
            "the annotations are of the same images, or train further"
        )
    scales = positive_edge_rows("scales", scales, len(errors))
    _check_choices(coverage, multiplicity, level, missed_share)
    _, image_index = np.unique(identities("image_ids", image_ids, len(errors)), return_inverse=True)
    rule = _Rule(exact_fraction(coverage), multiplicity, level, exact_fraction(missed_share), asymmetric)
    ratios = errors / scales
    needed = rule.labels_needed()
    class_factors, pooled_classes = {}, []
    if level == "class":
        classes = class_ids("classes", classes, len(errors))
        for name in np.unique(classes).tolist():
            own = classes == name
            if own.sum() < needed:
                pooled_classes.append(name)
            else:
                class_factors[name] = rule.factors(ratios[own], image_index[own])
    return Intervals(
        coverage=float(coverage),
        multiplicity=multiplicity,
        level=level,
        asymmetric=asymmetric,
        missed_share=float(missed_share),
        factors=rule.factors(ratios, image_index),
        class_factors=class_factors,
        pooled_classes=tuple(pooled_classes),
        num_labels=len(errors),
        num_images=int(image_index.max()) + 1,
        labels_needed=needed,
    )


def interval_scales(score: str, boxes: ArrayLike, stds: ArrayLike | None = None) -> Float[ndarray, "n 4"]:
    """Returns the scales of a conformal score.

    Args:
        score: `scaled`: the stds. `additive`: ones, intervals of equal width in pixels. `multiplicative`: the side of
            the predicted box across the edge, width for x1 and x2, height for y1 and y2, at least 1 pixel.
        boxes: [n, 4], `x1, y1, x2, y2` as predicted.
        stds: [n, 4], predicted sigma of each edge; needed by `scaled`.

    Raises:
        ValueError: the score is unknown, or `scaled` lacks stds.
    """
    choice("score", score, SCORES)
    boxes = edge_rows("boxes", boxes)
    if score == "additive":
        return np.ones_like(boxes)
    if score == "multiplicative":
        return np.tile(np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0), 2)
    if stds is None:
        raise ValueError("score 'scaled' needs stds; without them choose additive or multiplicative")
    return positive_edge_rows("stds", stds, len(boxes))


def split_images(image_ids: ArrayLike, share: float, seed: int) -> Bool[ndarray, " n"]:
    """Returns True for the rows of a random share of the images; no image is in both parts.

    Images are drawn and not boxes, because boxes of one image are alike. Each part has at least one image. The draw
    depends on the set of image ids and the seed, not on the order of the rows.

    Raises:
        ValueError: there are fewer than two images, or the share is not between 0 and 1.
    """
    images, index = np.unique(np.asarray(image_ids), return_inverse=True)
    if len(images) < 2:
        raise ValueError(f"a split by image needs two images or more; there are {len(images)}")
    if not 0 < share < 1:
        raise ValueError(f"share = {share} must be between 0 and 1, such as 0.5")
    count = min(max(round(share * len(images)), 1), len(images) - 1)
    drawn = np.zeros(len(images), bool)
    drawn[np.random.default_rng(seed).permutation(len(images))[:count]] = True
    return drawn[index]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """Checked choices of a fit; coverage and share are exact."""

    coverage: Fraction
    multiplicity: str
    level: str
    missed_share: Fraction
    asymmetric: bool

    def labels_needed(self) -> int:
        return quantiles.labels_needed(
            self.coverage, multiplicity=self.multiplicity, asymmetric=self.asymmetric
        )

    def factors(
        self, ratios: Float[ndarray, "n 4"], image_index: Int[ndarray, " n"]
    ) -> Float[ndarray, "2 4"]:
        """Factors of the scale, for the side towards smaller coordinates and for the other, by edge."""
        bounds = self._bounds(self._columns(ratios), image_index)
        outward, inward = np.broadcast_to(bounds.reshape(2 if self.asymmetric else 1, -1), (2, 4))
        return np.stack([np.where(OUTWARD < 0, outward, inward), np.where(OUTWARD < 0, inward, outward)])

    def _columns(self, ratios: Float[ndarray, "n 4"]) -> Float[ndarray, "n C"]:
        """Numbers of each box to bound: of all edges or of each, of both sides or first outward and then inward."""
        sides = [ratios * OUTWARD, -ratios * OUTWARD] if self.asymmetric else [np.abs(ratios)]
        if self.multiplicity == "max":
            sides = [side.max(axis=1, keepdims=True) for side in sides]
        return np.concatenate(sides, axis=1)

    def _bounds(
        self, columns: Float[ndarray, "n C"], image_index: Int[ndarray, " n"]
    ) -> Float[ndarray, " C"]:
        if self.level == "image_mean":
            risk = (1 - self.coverage) / (2 if self.asymmetric else 1)
            return quantiles.risk_bounds(columns, image_index, risk)
        if self.level == "image":
            columns = quantiles.image_columns(columns, image_index, self.missed_share)
        rank = quantiles.conformal_rank(
            len(columns), self.coverage, multiplicity=self.multiplicity, asymmetric=self.asymmetric
        )
        if self.multiplicity == "max_rank":
            return quantiles.max_rank_bounds(columns, rank)
        return quantiles.order_statistics(columns, rank)


def _check_choices(coverage: float, multiplicity: str, level: str, missed_share: float) -> None:
    if not 0 < coverage < 1:
        raise ValueError(
            f"coverage = {coverage} must be above 0 and below 1, such as 0.9: no finite interval holds every label"
        )
    choice("multiplicity", multiplicity, MULTIPLICITIES)
    choice("level", level, LEVELS)
    if not 0 <= missed_share < 1:
        raise ValueError(f"missed_share = {missed_share} must be from 0 to below 1, such as 0.1")
    if missed_share and level != "image":
        raise ValueError(
            f"missed_share = {missed_share} is for level 'image' and not for {level!r}; leave it out"
        )
    if (missed_share or level == "image_mean") and multiplicity not in ("max", "edge"):
        raise ValueError(
            f"multiplicity {multiplicity!r} does not fit a share of missed boxes; choose max or edge"
        )
