"""A picture of the outer and inner boxes of a run's detections: docs/intervals.jpg."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageDraw

from klbox_jax.data.source import Source
from klbox_jax.evaluation.edge_calibration import FILE_KEY
from klbox_jax.evaluation.intervals import outer_and_inner_boxes
from klbox_jax.evaluation.matching import corners
from klbox_jax.report.pictures import LabeledBoxes, contact_sheet, draw_detections

# Least score of a detection that is drawn, numbers of them in an image, and the factor that enlarges it.
SHOWN_SCORE, NUM_SHOWN, SCALE = 0.5, (3, 4), 2


def draw(source: Source, results: Sequence[Mapping], *, count: int = 3) -> UInt8[ndarray, "h w 3"]:
    """Draws the detections of the first images with three or four shown ones, and the outer and inner box of each.

    Args:
        source: the images.
        results: of an evaluation after a calibration, with `bbox_interval_90`.
        count: number of images.
    """
    shown = collections.defaultdict(list)
    for entry in results:
        if entry["score"] >= SHOWN_SCORE:
            shown[entry["image_id"]].append(entry)
    labels = collections.defaultdict(list)
    for entry in source.coco_ground_truth()["annotations"]:
        labels[entry["image_id"]].append(entry)
    chosen = [i for i, record in enumerate(source.records) if len(shown[record.image_id]) in NUM_SHOWN][
        :count
    ]
    pictures = [
        _draw(
            source.load_image(i),
            shown[source.records[i].image_id],
            labels[source.records[i].image_id],
            source,
        )
        for i in chosen
    ]
    return contact_sheet(pictures, columns=count)


def _draw(
    image: UInt8[ndarray, "h w 3"], entries: Sequence[Mapping], labels: Sequence[Mapping], source: Source
) -> UInt8[ndarray, "_ _ 3"]:
    """Draws an image: predicted boxes, labels dashed in white, outer and inner boxes as thin lines."""
    names = dict(zip(source.category_ids, source.class_names, strict=True))
    boxes = LabeledBoxes(
        boxes=corners(entries, "bbox"),
        labels=[names[entry["category_id"]] for entry in entries],
        scores=np.array([entry["score"] for entry in entries]),
    )
    gt_boxes = corners([{"box": entry.get("bbox_noisy", entry["bbox"])} for entry in labels], "box")
    drawn = draw_detections(image, boxes, gt_boxes=gt_boxes, class_names=source.class_names, scale=SCALE)
    picture = Image.fromarray(drawn)
    pen = ImageDraw.Draw(picture)
    for entry in entries:
        ends = (np.array([entry[FILE_KEY][side]], np.float64) for side in ("lower", "upper"))
        for box in outer_and_inner_boxes(*ends):
            x1, y1, x2, y2 = (SCALE * box[0]).tolist()
            if x1 < x2 and y1 < y2:  # an inner box may be empty
                pen.rectangle((x1, y1, x2, y2), outline=(255, 255, 255))
                pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0))
    return np.asarray(picture)
