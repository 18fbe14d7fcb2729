"""The objects that a detector found in one image, as NumPy arrays, and their conversion for other tools."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from klbox_jax.evaluation.coco import to_coco_results
from klbox_jax.evaluation.masks import paste_mask
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
    """

    boxes: Float[ndarray, "n 4"]
    scores: Float[ndarray, " n"]
    classes: Int[ndarray, " n"]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    box_stds: Float[ndarray, "n 4"] | None
    masks: Float[ndarray, "n m m"] | None
    image_size: tuple[int, int]

    def to_coco(self, image_id: int) -> list[dict]:
        """Returns the objects as entries of a COCO results file; see `to_coco_results`.

        Each entry also has the name of its class, as `category`.
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
        return results

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
