"""The objects that a detector found in one image, as NumPy arrays, and their conversion for other tools."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from klbox_jax.evaluation.coco import to_coco_results
from klbox_jax.evaluation.edge_calibration import EdgeCalibration
from klbox_jax.evaluation.masks import paste_mask
from klbox_jax.serving.edge_intervals import EdgeIntervals, calibrated, edge_intervals
from klbox_jax.structures import Detections


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The objects found in one image, best first, in pixels of the file after its EXIF rotation.

    Attributes:
        boxes: `x1, y1, x2, y2`, continuous edges.
        scores: class probability after suppression.
        classes: index into `class_names`.
        class_names: names of all classes.
        category_ids: the data set's own id of each class.
        box_stds: standard deviation of each edge, or None if the detector does not predict it.
        masks: mask probabilities; each mask covers its box. None if the detector has no masks.
        image_size: height and width of the image.
        edge_calibration: intervals and score curves of `--mode=calibrate`, or None.
    """

    boxes: Float[ndarray, "n 4"]
    scores: Float[ndarray, " n"]
    classes: Int[ndarray, " n"]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    box_stds: Float[ndarray, "n 4"] | None
    masks: Float[ndarray, "n m m"] | None
    image_size: tuple[int, int]
    edge_calibration: EdgeCalibration | None = None

    def intervals(
        self, coverage: float = 0.9, *, level: str = "box", min_score: float = 0.0
    ) -> EdgeIntervals:
        """Returns an interval for each edge, from split conformal prediction; `promise` says what is promised.

        Args:
            coverage: between 0 and 1.
            level: `box`, `class`, `image` or `image_mean`, see `klbox_jax.evaluation.conformal.fit_intervals`.
            min_score: fit to calibration boxes of this score or more, for a promise on such boxes.

        Raises:
            ValueError: there is no calibration of this post-processing, it has too few labels for the coverage, or an
                argument is out of range.
        """
        calibration = calibrated(self.edge_calibration)
        fitted = calibration.intervals(coverage, level=level, min_score=min_score)
        half = calibration.half_widths(fitted, self.box_stds, self._category_ids)
        return edge_intervals(self.boxes, half, fitted, calibration.promise(fitted, min_score=min_score))

    @property
    def calibrated_scores(self) -> Float[ndarray, " n"]:
        """Expected IoU of each box with its object, 0 if it has none; raises ValueError without a calibration."""
        return calibrated(self.edge_calibration).calibrated_scores(self.scores, self._category_ids)

    @property
    def _category_ids(self) -> Shaped[ndarray, " n"]:
        return np.array(self.category_ids)[self.classes]

    def to_coco(self, image_id: int) -> list[dict]:
        """Returns the objects as entries of a COCO results file; see `to_coco_results`.

        Each entry also has the name of its class, as `category`, and with a calibration `bbox_interval_90` and
        `score_calibrated`, see `EdgeCalibration.with_intervals`.
        """
        found = Detections(
            boxes=self.boxes,
            scores=self.scores,
            classes=self.classes,
            candidate_index=np.zeros_like(self.classes),
            valid=np.ones(len(self.scores), bool),
            box_stds=self.box_stds,
            masks=self.masks,
        )
        results = to_coco_results(
            jax.tree.map(lambda rows: rows[None], found),
            np.array([image_id]),
            np.array([True]),
            self.category_ids,
            image_sizes=np.array([self.image_size]),
        )
        for entry, index in zip(results, self.classes, strict=True):
            entry["category"] = self.class_names[index]
        return results if self.edge_calibration is None else self.edge_calibration.with_intervals(results)

    def to_supervision(self) -> Any:
        """Returns the objects as `supervision.Detections`; its `data` has `box_std` and `class_name`.

        Raises:
            ImportError: the library is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs the library: pip install supervision") from error

        height, width = self.image_size
        masks = None
        if self.masks is not None:
            masks = np.zeros((len(self.masks), height, width), bool)
            for row, (mask, box) in enumerate(zip(self.masks, self.boxes, strict=True)):
                masks[row] = paste_mask(mask, box, height=height, width=width)
        data = {"class_name": np.array([self.class_names[index] for index in self.classes], dtype=str)}
        if self.box_stds is not None:
            data["box_std"] = self.box_stds
        return supervision.Detections(
            xyxy=self.boxes, mask=masks, confidence=self.scores, class_id=self.classes, data=data
        )
