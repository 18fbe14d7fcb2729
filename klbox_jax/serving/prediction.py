"""The objects that a detector found in one image, as NumPy arrays, and their conversion for other tools."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from PIL import Image

from klbox_jax.config.paths import local_path
from klbox_jax.evaluation.coco import to_coco_results
from klbox_jax.evaluation.edge_calibration import EdgeCalibration
from klbox_jax.evaluation.masks import paste_mask
from klbox_jax.files import write_json
from klbox_jax.report.pictures import LabeledBoxes, draw_detections
from klbox_jax.serving.edge_intervals import EdgeIntervals, calibrated, edge_intervals
from klbox_jax.serving.images import read_image
from klbox_jax.structures import Detections

_EDGES = ("x1", "y1", "x2", "y2")
# Fields with a row for each object.
_ROWS = ("boxes", "scores", "classes", "box_stds", "masks")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The objects found in one image, best first, in pixels of the file after its EXIF rotation.

    `len(found)` is the number of objects. `found[3]`, `found[:10]` and `found[found.scores > 0.5]` are predictions of
    some of them, and a loop goes through predictions of one object each.

    Attributes:
        boxes: `x1, y1, x2, y2`, continuous edges.
        scores: class probability after suppression.
        classes: index into `class_names`.
        class_names: names of all classes that the detector knows; `names` has one for each object.
        category_ids: the data set's own id of each class.
        box_stds: standard deviation of each edge, or None if the detector does not predict it.
        masks: mask probabilities; each mask covers its box. None if the detector has no masks.
        image_size: height and width of the image.
        source: what the detector was called on, which `draw` reads; None if that is not known.
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
    source: Any = None
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

    @property
    def names(self) -> list[str]:
        """The name of the class of each object."""
        return [self.class_names[index] for index in self.classes]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        """Returns the number of objects and the best of them."""
        height, width = self.image_size
        best = zip(self.names[:3], self.scores[:3], strict=True)
        shown = ", ".join(f"{name} {score:.2f}" for name, score in best)
        objects = "1 object" if len(self) == 1 else f"{len(self)} objects"
        more = ", ..." if len(self) > 3 else ""
        return f"Prediction({objects} in {width} x {height} pixels{': ' if shown else ''}{shown}{more})"

    def __getitem__(self, rows: Any) -> "Prediction":
        """Returns the objects that an index, a slice, a mask or an array of indices selects.

        Raises:
            IndexError: an index is out of range, or a mask is not as long as the prediction.
            TypeError: it is none of these.
        """
        if isinstance(rows, slice):
            chosen: Any = rows
        else:
            chosen = np.asarray(rows)
            if chosen.size == 0 and chosen.ndim == 1:
                chosen = chosen.astype(int)
            if (
                chosen.ndim > 1
                or chosen.dtype.kind not in "biu"
                or (chosen.ndim == 0 and chosen.dtype == bool)
            ):
                raise TypeError(f"a prediction is indexed by an index, a slice or a mask, not by {rows!r}")
            chosen = chosen.reshape(-1)
        values = {name: getattr(self, name) for name in _ROWS}
        return dataclasses.replace(
            self, **{name: None if value is None else value[chosen] for name, value in values.items()}
        )

    def above(self, score: float | int) -> "Prediction":
        """Returns the objects whose score is `score` or more."""
        return self[self.scores >= score]

    def draw(self, image: Any = None) -> Image.Image:
        """Returns a picture of the image with all objects: `found.above(0.5).draw()` shows the likely ones.

        The bands around each line are one and two standard deviations of its edge.

        Args:
            image: the image in one of the forms of `read_image`; by default the one that the detector was called on.

        Raises:
            DataError: the image cannot be read, or is of another size. A ValueError.
            ValueError: the image is not known.
        """
        image = self.source if image is None else image
        if image is None:
            raise ValueError("the prediction does not know its image; give it: found.draw(image)")
        if hasattr(image, "seek") and hasattr(image, "read") and not isinstance(image, Image.Image):
            image.seek(0)  # the detector has read the file to its end
        pixels = read_image(image)
        if pixels.shape[:2] != tuple(self.image_size):
            raise ValueError(
                f"the image is {pixels.shape[1]} x {pixels.shape[0]} pixels, but the objects are those of an image of "
                f"{self.image_size[1]} x {self.image_size[0]}"
            )
        boxes = LabeledBoxes(boxes=self.boxes, labels=self.names, scores=self.scores, stds=self.box_stds)
        return Image.fromarray(draw_detections(pixels, boxes, class_names=self.class_names))

    def save(self, path: str | os.PathLike, image: Any = None) -> None:
        """Writes the picture of `draw`, or for a name that ends in `.json` the entries of `to_coco`.

        Args:
            path: the file; its folder has to exist. The suffix is that of a picture, such as .jpg or .png, or .json.
            image: see `draw`.

        Raises:
            ValueError: the suffix or the folder is unknown; or see `draw`.
        """
        file = pathlib.Path(local_path(path, "path"))
        if not file.absolute().parent.is_dir():
            raise ValueError(f"{file.absolute().parent} is not a folder; create it, or choose another path")
        if file.suffix.lower() == ".json":
            write_json(file, self.to_coco())
            return
        if file.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"):
            raise ValueError(
                f"{file} ends in no known suffix; use .jpg or .png for a picture, .json for the objects"
            )
        self.draw(image).save(file, quality=92)

    def to_pandas(self) -> Any:
        """Returns a `pandas.DataFrame` with a row for each object.

        Its columns are `name`, `score`, the edges `x1, y1, x2, y2`, their standard deviations `std_x1` to `std_y2` if
        the detector predicts them, `class_index` and `category_id`.

        Raises:
            ImportError: the library is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs the library: pip install pandas") from error

        columns: dict[str, Any] = {"name": self.names, "score": self.scores}
        columns |= {edge: self.boxes[:, i] for i, edge in enumerate(_EDGES)}
        if self.box_stds is not None:
            columns |= {f"std_{edge}": self.box_stds[:, i] for i, edge in enumerate(_EDGES)}
        columns |= {"class_index": self.classes, "category_id": [self.category_ids[i] for i in self.classes]}
        return pandas.DataFrame(columns)

    def to_coco(self, image_id: int = 1) -> list[dict]:
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
        for entry, name in zip(results, self.names, strict=True):
            entry["category"] = name
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
        data = {"class_name": np.array(self.names, dtype=str)}
        if self.box_stds is not None:
            data["box_std"] = self.box_stds
        return supervision.Detections(
            xyxy=self.boxes, mask=masks, confidence=self.scores, class_id=self.classes, data=data
        )
