"""COCO dictionaries reduced to the fields that the evaluators read, with ids 1, 2, ... for any ids of the data set."""

import collections
import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from pycocotools import mask as pycocotools_mask

from klbox_jax.data.masks import to_compressed_rle


@dataclasses.dataclass(frozen=True)
class EvaluatorData:
    """Ground truth and results as both back ends read them.

    The evaluators handle text, negative and zero ids differently, so images and categories are numbered from 1 in the
    order of their ids.

    Attributes:
        truth: COCO dictionary of the ground truth.
        found: COCO dictionary of the results.
        category_ids: the data set's own category ids; number `k` is at position `k - 1`.
    """

    truth: dict
    found: dict
    category_ids: list


def evaluator_data(ground_truth: dict, results: list[dict], iou_type: str) -> EvaluatorData:
    """Reduces ground truth and results to the fields that the evaluators read.

    The area of an annotation is its `area`, or that of its box or mask if there is none (or it is null). The area of a
    result is always that of its box, or of its mask for `iou_type` "segm"; an `area` in a results file is ignored, as
    in pycocotools' `loadRes`. Annotations of unknown images and categories are left out.

    Args:
        ground_truth: COCO dictionary.
        results: entries whose images and categories are known.
        iou_type: "bbox" or "segm".

    Raises:
        ValueError: a mask is malformed, or the area of an annotation is not a finite number.
    """
    images = {image["id"]: image for image in ground_truth["images"]}
    image_numbers = _numbered(images)
    category_numbers = _numbered(category["id"] for category in ground_truth["categories"])

    sides = ("height", "width") if iou_type == "segm" else ()

    def reduced(entries: list[dict], label: str) -> dict:
        annotations = []
        for i, entry in enumerate(entries):
            if entry["image_id"] in image_numbers and entry["category_id"] in category_numbers:
                copy = _reduced_entry(entry, images, iou_type, name=f"{label}[{i}]")
                copy["image_id"] = image_numbers[entry["image_id"]]
                copy["category_id"] = category_numbers[entry["category_id"]]
                copy["id"] = len(annotations) + 1
                annotations.append(copy)
        return {
            "images": [
                {"id": number} | {side: images[value][side] for side in sides}
                for value, number in image_numbers.items()
            ],
            "categories": [{"id": number, "name": str(number)} for number in category_numbers.values()],
            "annotations": annotations,
        }

    return EvaluatorData(
        truth=reduced(ground_truth["annotations"], "annotations"),
        found=reduced([entry | {"area": None} for entry in results], "results"),
        category_ids=list(category_numbers),
    )


def check_results(ground_truth: dict, results: list[dict]) -> None:
    """Raises ValueError for the first result with an unknown image or category, or a number that is not finite."""
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    for i, entry in enumerate(results):
        for key, known in (("image_id", image_ids), ("category_id", category_ids)):
            if entry.get(key) not in known:
                raise ValueError(f"results[{i}]: {key} {entry.get(key)!r} is not in the ground truth")
        if not all(math.isfinite(number) for number in (entry["score"], *entry["bbox"])):
            raise ValueError(
                f"results[{i}]: box and score must be finite, not {entry['bbox']}, {entry['score']}"
            )


def category_names(ground_truth: dict) -> dict[Any, str]:
    """Returns the name of each category by id, in the order of the ids; `name (id)` if two share a name."""
    counts = collections.Counter(category["name"] for category in ground_truth["categories"])
    names = {
        category["id"]: category["name"]
        if counts[category["name"]] == 1
        else f"{category['name']} ({category['id']})"
        for category in ground_truth["categories"]
    }
    return {category_id: names[category_id] for category_id in sorted_ids(names)}


def sorted_ids(ids: Iterable[Hashable]) -> list:
    """Returns the distinct ids in ascending order, numbers before texts."""
    return sorted(set(ids), key=lambda value: (isinstance(value, str), value))


def _numbered(ids: Iterable[Hashable]) -> dict[Any, int]:
    return {value: number for number, value in enumerate(sorted_ids(ids), start=1)}


def _reduced_entry(entry: dict, images: Mapping[Any, dict], iou_type: str, *, name: str) -> dict:
    """Returns box, score, crowd flag, area and mask of an annotation or result."""
    reduced = {"bbox": entry["bbox"], "iscrowd": int(bool(entry.get("iscrowd")))}
    if "score" in entry:
        reduced["score"] = entry["score"]
    area = entry["bbox"][2] * entry["bbox"][3]
    if iou_type == "segm":
        image = images[entry["image_id"]]
        try:
            mask = to_compressed_rle(entry.get("segmentation"), height=image["height"], width=image["width"])
        except ValueError as error:
            raise ValueError(f"{name}: invalid 'segmentation': {error}") from None
        reduced["segmentation"] = mask
        area = float(pycocotools_mask.area(mask))
    if entry.get("area") is not None:
        area = entry["area"]
        if not isinstance(area, int | float) or not math.isfinite(area):
            raise ValueError(f"{name}: area must be a finite number or null, not {area!r}")
    reduced["area"] = area
    return reduced
