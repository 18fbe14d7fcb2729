"""Intervals of box edges as `klbox_jax.evaluation.conformal` fits them, and the boxes that they bound."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike

from klbox_jax.evaluation.array_checks import class_ids, positive_edge_rows
from klbox_jax.evaluation.by_class import from_lists, from_pairs, rows_of_classes, to_lists, to_pairs

# The coordinate of each edge, x1, y1, x2, y2, changes in this direction where the edge moves out of the box.
OUTWARD = np.array([-1.0, -1.0, 1.0, 1.0])


@dataclasses.dataclass(frozen=True, eq=False)
class Intervals:
    """Fitted quantiles of box edges; `half_widths` turns scales into intervals.

    Attributes:
        coverage, multiplicity, level, asymmetric, missed_share: as given to `fit_intervals`.
        factors: multiples of the scale, of the side towards smaller coordinates and of the other, by edge; infinite
            where there were too few labels.
        class_factors: the same for each class that has a quantile of its own.
        pooled_classes: classes of the calibration set that use `factors`, because they have too few labels.
        num_labels, num_images: what the quantiles were fitted to.
        labels_needed: how many labels (images, for a level of images) make a bound finite.
    """

    coverage: float
    multiplicity: str
    level: str
    asymmetric: bool
    missed_share: float
    factors: Float[ndarray, "2 4"]
    class_factors: dict[int | str, Float[ndarray, "2 4"]]
    pooled_classes: tuple[int | str, ...]
    num_labels: int
    num_images: int
    labels_needed: int

    def half_widths(
        self, scales: ArrayLike, classes: ArrayLike | None = None
    ) -> Float[ndarray, "m 4"] | tuple[Float[ndarray, "m 4"], Float[ndarray, "m 4"]]:
        """Returns how far the interval of each edge reaches from the prediction, in the unit of the scales.

        Args:
            scales: [m, 4], positive; of the same kind as those that were fitted.
            classes: [m], needed by level `class`. One without a quantile of its own has the pooled one.

        Returns:
            [m, 4]; with `asymmetric` a pair, towards smaller and towards larger coordinates, where a half width is
            negative if nearly all labels are on the other side of the prediction.

        Raises:
            ValueError: wrong shapes, a scale that is not positive and finite, or classes are missing.
        """
        scales = positive_edge_rows("scales", scales)
        factors = self.factors[None]
        if self.level == "class":
            factors = rows_of_classes(
                self.factors, self.class_factors, class_ids("classes", classes, len(scales))
            )
        lower, upper = factors[:, 0] * scales, factors[:, 1] * scales
        return (lower, upper) if self.asymmetric else lower

    def promise(self) -> str:
        """Returns the promise in one sentence, with what it is conditional on."""
        share = f"{100 * self.coverage:g} %"
        inside = (
            "the label of an edge is" if self.multiplicity == "edge" else "all four edges of the label are"
        )
        if self.level == "image_mean":
            of_what = (
                f"on average over images, {inside} inside for at least {share} of an image's matched boxes"
            )
        elif self.level == "image" and self.missed_share:
            of_what = (
                f"in at least {share} of images, {inside} inside for all but {100 * self.missed_share:g} % of "
                "the matched boxes"
            )
        elif self.level == "image":
            of_what = f"in at least {share} of images, {inside} inside for every matched box"
        else:
            of_what = f"{inside} inside for at least {share} of matched boxes"
            of_what += " of each class" if self.level == "class" else ""
        units = "images" if self._counts_images else "boxes"
        independent = ", and edges that err independently" if self.multiplicity == "sidak" else ""
        return (
            f"{of_what[0].upper()}{of_what[1:]}, for {units} exchangeable with the calibration {units}, the same "
            f"match, score threshold and post-processing{independent}."
        )

    def warning(self) -> str | None:
        """Returns one line on missing labels, or None: infinite intervals, classes that use the pooled quantile."""
        unit = "images" if self._counts_images else "labels"
        if not np.isfinite(self.factors).all():
            count = self.num_images if self._counts_images else self.num_labels
            return (
                f"coverage {self.coverage:g} by {self.multiplicity!r} needs {self.labels_needed} calibration {unit} "
                f"and there are {count}, so the intervals are infinite; annotate more images or lower the coverage"
            )
        if self.pooled_classes:
            return (
                f"classes {', '.join(map(str, self.pooled_classes))} have fewer than {self.labels_needed} {unit} and "
                "use the quantile of all classes, which promises nothing for one of them alone"
            )
        return None

    @property
    def _counts_images(self) -> bool:
        return self.level.startswith("image")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, texts and None for JSON; an infinite factor is None."""
        return dataclasses.asdict(self) | {
            "factors": to_lists(self.factors),
            "class_factors": to_pairs(self.class_factors),
            "pooled_classes": list(self.pooled_classes),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Intervals":
        """Returns the record that `to_dict` wrote."""
        return cls(
            **fields
            | {
                "factors": from_lists(fields["factors"]),
                "class_factors": from_pairs(fields["class_factors"]),
                "pooled_classes": tuple(fields["pooled_classes"]),
            }
        )


def outer_and_inner_boxes(
    lower: Float[ndarray, "n 4"], upper: Float[ndarray, "n 4"]
) -> tuple[Float[ndarray, "n 4"], Float[ndarray, "n 4"]]:
    """Returns the largest and the smallest box whose edges are all within their intervals.

    Args:
        lower, upper: ends of the interval of each edge, in pixels.

    Returns:
        Outer and inner boxes, `x1, y1, x2, y2`. An inner box with x1 >= x2 or y1 >= y2 is empty: the intervals of
        opposite edges overlap, and no point is certain to belong to the object.
    """
    outward_is_lower = OUTWARD < 0
    return np.where(outward_is_lower, lower, upper), np.where(outward_is_lower, upper, lower)
