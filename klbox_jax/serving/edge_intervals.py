"""Intervals of the edges of one image's boxes."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.evaluation.edge_calibration import COVERAGES, EdgeCalibration
from klbox_jax.evaluation.intervals import Intervals, outer_and_inner_boxes
from klbox_jax.evaluation.uncertainty import STD_FLOOR


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeIntervals:
    """An interval for each edge, one row for each box, in pixels of the file; not cut at the border of the image.

    Attributes:
        lower, upper: ends of the intervals of `x1, y1, x2, y2`.
        coverage: that is promised.
        promise: in one sentence, with what it is conditional on.
        warning: one line on classes that use the quantile of all classes, or None.
    """

    lower: Float[ndarray, "n 4"]
    upper: Float[ndarray, "n 4"]
    coverage: float
    promise: str
    warning: str | None

    @property
    def outer(self) -> Float[ndarray, "n 4"]:
        """The largest box whose edges are all in their intervals, `x1, y1, x2, y2`."""
        return outer_and_inner_boxes(self.lower, self.upper)[0]

    @property
    def inner(self) -> Float[ndarray, "n 4"]:
        """The smallest box whose edges are all in their intervals; empty, x1 >= x2 or y1 >= y2, where they overlap."""
        return outer_and_inner_boxes(self.lower, self.upper)[1]


def edge_intervals(
    boxes: Float[ndarray, "n 4"], half_widths: Float[ndarray, "n 4"], fitted: Intervals, promise: str
) -> EdgeIntervals:
    """Returns the intervals of boxes; raises ValueError if the calibration has too few labels for the coverage."""
    if not np.isfinite(fitted.factors).all():
        raise ValueError(fitted.warning())
    return EdgeIntervals(boxes - half_widths, boxes + half_widths, fitted.coverage, promise, fitted.warning())


def calibrated(calibration: EdgeCalibration | None) -> EdgeCalibration:
    """Returns the calibration; raises ValueError with the remedy if there is none."""
    if calibration is None:
        raise ValueError(
            "this checkpoint has no intervals under this post-processing; run --mode=calibrate with the same "
            "config.postprocess, on labelled images that were not trained on"
        )
    return calibration


def exported_intervals(calibration: EdgeCalibration) -> list[dict[str, Any]]:
    """Returns for each of `COVERAGES` what model.json says of it.

    Half of an interval is `max(factor * std, least)` pixels, with the stds that the program returns. `factors` and
    `least` are None where there are too few labels.
    """
    found = []
    for coverage in COVERAGES:
        fitted = calibration.intervals(coverage)
        multiple = float(fitted.factors[0, 0])
        is_finite = math.isfinite(multiple)
        found.append(
            {
                "coverage": coverage,
                "factors": (multiple / calibration.temperature).tolist() if is_finite else None,
                "least": multiple * STD_FLOOR if is_finite else None,
                "promise": calibration.promise(fitted) if is_finite else fitted.warning(),
            }
        )
    return found
