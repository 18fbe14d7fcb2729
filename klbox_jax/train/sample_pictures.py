"""Draws detections on a few evaluation images, for TensorBoard and for the pictures of experiments."""

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from klbox_jax.data.source import DataError, Source
from klbox_jax.report.pictures import LabeledBoxes, draw_detections, shrink

# Detections below this score are not drawn.
MIN_SCORE = 0.4
# Larger images are shrunk to this.
LONG_SIDE = 800


def draw_samples(source: Source, results: list[dict], *, count: int) -> dict[str, UInt8[ndarray, "_ _ 3"]]:
    """Returns pictures by image id: boxes with bands of one and two stds, true boxes dashed.

    The images are spread evenly over the set and are the same at each evaluation. Unreadable images are left out.

    Args:
        source: the evaluation set.
        results: entries of a COCO results file, with `bbox_std` if the detector predicts variances.
        count: largest number of pictures.
    """
    class_of = dict(zip(source.category_ids, source.class_names, strict=True))
    indices = np.linspace(0, len(source.records) - 1, min(count, len(source.records)))
    pictures = {}
    for index in indices.astype(int).tolist():
        record = source.records[index]
        try:
            image = shrink(source.load_image(index), long_side=LONG_SIDE)
        except DataError:  # the loader has reported it
            continue
        scale = np.tile([image.shape[1] / record.width, image.shape[0] / record.height], 2)[None]
        found = [r for r in results if r["image_id"] == record.image_id and r["score"] >= MIN_SCORE]
        boxes = np.array([r["bbox"] for r in found], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        stds = None
        if all("bbox_std" in r for r in found):
            stds = np.array([r["bbox_std"] for r in found], np.float64).reshape(-1, 4) * scale
        pictures[str(record.image_id)] = draw_detections(
            image,
            LabeledBoxes(
                boxes=boxes * scale,
                labels=[class_of[r["category_id"]] for r in found],
                scores=np.array([r["score"] for r in found], np.float64),
                stds=stds,
            ),
            gt_boxes=record.boxes.astype(np.float64) * scale,
            class_names=source.class_names,
        )
    return pictures
