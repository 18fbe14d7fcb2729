"""Single detections of a report: matches with objects, pictures, and galleries of the best and worst ones.

Rows are lists, which are short in JSON. A detection is `[x1, y1, x2, y2, score, class, kind, iou]`, followed by the
stds of its four edges if the run has stds; an object is `[x1, y1, x2, y2, class, is_crowd]`. Classes are dense indices,
kinds those of `klbox_jax.evaluation.matching`, lengths in pixels of the file.
"""

import base64
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image

from klbox_jax.evaluation.matching import (
    FALSE_POSITIVE,
    LOCALIZATION_ERROR,
    TRUE_POSITIVE,
    Matches,
    match_detections,
)
from klbox_jax.report.page_data import Run

KINDS = ("true positive", "duplicate", "localization error", "false positive", "in a crowd")
GALLERIES = {
    "best": "Best: true positives of the highest IoU",
    "worst": "Worst: false positives and localization errors of the highest score",
    "uncertain": "Most uncertain: the highest sigma for the size of the box, of scores from 0.5 on",
}
_GALLERY_SIZE = 12
_UNCERTAIN_SCORE = 0.5
# Pixels of the long side of a picture, for up to a number of images; a page of 500 has 10 to 20 MB.
_PICTURE_SIDES = ((640, 150), (400, math.inf))
_PICTURE_QUALITY = 70
_CROP_SIDE, _CROP_QUALITY = 240, 80
_MIN_WINDOW = 48.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Detections and pictures of a page, ready for JSON.

    Attributes:
        content: `classes`, `kinds`, `runs` (each with `label` and `stds`, True if it has stds), `images` and
            `galleries` of rows (`extra` images are only there because a gallery shows a part of them), and
            `sigma_limits`, the largest values of the filter by sigma in pixels and relative.
        pictures: data URIs of the `images` and of the galleries' `crops`.
        sigma_and_error: of each run, std and absolute error relative to the label, of every edge of the true positives;
            None without stds.
    """

    content: dict
    pictures: dict[str, list[str]]
    sigma_and_error: list[Float[ndarray, "2 _"] | None]


def relative_sigma(boxes: Float[ndarray, "n 4"], stds: Float[ndarray, "n 4"]) -> Float[ndarray, " n"]:
    """Returns the mean over the edges of std / side, where side is the extent across the edge, at least 1 pixel."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0)
    return (stds / np.concatenate([sides, sides], axis=1)).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class _MatchedRun:
    """Detections of a run, matched with the objects of the data set.

    Attributes:
        run: with detections.
        match: of its detections.
        rows: by image id, rank and row of each detection, best scores first.
    """

    run: Run
    match: Matches
    rows: dict[int, list[tuple[int, list]]]


def find_examples(runs: Sequence[Run], source: Any, *, num_images: int) -> Examples:
    """Matches the detections of the runs with the objects of their data set, and selects what the page shows.

    Args:
        runs: runs of one data set.
        source: the data set, a `klbox_jax.data.source.Source`.
        num_images: largest number of images in the browser, without those of the galleries. Of a larger data set,
            evenly spaced images are shown; galleries use all images.

    Raises:
        ValueError: the detections do not belong to the data set, or an image cannot be read.
    """
    truth = source.coco_ground_truth()
    count = len(source.records)
    sample = set(np.linspace(0, count - 1, min(num_images, count)).round().astype(int).tolist())
    class_index = {category: i for i, category in enumerate(source.category_ids)}
    objects = _object_rows(truth, class_index)
    matched = [_match(run, truth, class_index) for run in runs]
    galleries, crops = _galleries(matched, source, objects)
    chosen = sorted(sample | {index for index, _ in crops})
    for gallery in galleries:
        for item in gallery["items"]:
            item["image"] = chosen.index(crops[item["crop"]][0])
    content = {
        "classes": list(source.class_names),
        "kinds": list(KINDS),
        "runs": [{"label": one.run.label, "stds": one.match.stds is not None} for one in matched],
        "images": [
            _image(source.records[index], objects, matched) | {"extra": index not in sample}
            for index in chosen
        ],
        "galleries": galleries,
        "sigma_limits": _sigma_limits([one.match for one in matched]),
    }
    return Examples(
        content=content,
        pictures=_pictures(source, chosen, crops),
        sigma_and_error=[_sigma_and_error(one.match) for one in matched],
    )


def _image(record: Any, objects: dict[int, list[list]], matched: Sequence[_MatchedRun]) -> dict:
    """Returns the entry of one image in the browser."""
    return {
        "id": record.image_id,
        "name": os.path.basename(record.file_name),
        "size": [record.width, record.height],
        "objects": objects.get(record.image_id, []),
        "found": [[row for _, row in one.rows.get(record.image_id, [])] for one in matched],
    }


def _galleries(
    matched: Sequence[_MatchedRun], source: Any, objects: dict[int, list[list]]
) -> tuple[list[dict], list[tuple[int, list[int]]]]:
    """Returns the galleries of all runs, and index and window of each crop they show."""
    index_of_id = {record.image_id: i for i, record in enumerate(source.records)}
    galleries, crops = [], []
    for number, one in enumerate(matched):
        row_of_rank = {rank: row for entries in one.rows.values() for rank, row in entries}
        for key in GALLERIES:
            items = []
            for rank in _gallery_ranks(one.match, key).tolist():
                index = index_of_id[one.run.detections[one.match.result_index[rank]]["image_id"]]
                record = source.records[index]
                window = _window(one.match, rank, width=record.width, height=record.height)
                items.append(
                    {
                        "row": row_of_rank[rank],
                        "window": window,
                        "objects": _own_objects(one.match, rank, objects.get(record.image_id, [])),
                        "id": record.image_id,
                        "crop": len(crops),
                    }
                )
                crops.append((index, window))
            galleries.append({"run": number, "key": key, "items": items})
    return galleries, crops


def _match(run: Run, truth: dict, class_index: dict[int, int]) -> _MatchedRun:
    threshold = (run.metrics.get("uncertainty") or {}).get("iou_threshold") or 0.5
    match = match_detections(truth, run.detections, iou_threshold=threshold)
    return _MatchedRun(run, match, _detection_rows(run, match, class_index))


def _sigma_and_error(match: Matches) -> Float[ndarray, "2 m"] | None:
    if match.stds is None:
        return None
    rows = match.kind == TRUE_POSITIVE
    errors = np.abs(match.boxes[rows] - match.objects.labels[match.object_index[rows]])
    return np.stack([match.stds[rows].ravel(), errors.ravel()])


def _gallery_ranks(match: Matches, key: str) -> Int[ndarray, " n"]:
    """Returns the ranks of the detections of a gallery."""
    if key == "best":
        rows = np.flatnonzero(match.kind == TRUE_POSITIVE)
        order = -match.iou[rows]
    elif key == "worst":
        rows = np.flatnonzero((match.kind == FALSE_POSITIVE) | (match.kind == LOCALIZATION_ERROR))
        order = -match.scores[rows]
    elif match.stds is None:
        return np.zeros(0, int)
    else:
        rows = np.flatnonzero(match.scores >= _UNCERTAIN_SCORE)
        order = -relative_sigma(match.boxes[rows], match.stds[rows])
    return rows[np.argsort(order, kind="stable")[:_GALLERY_SIZE]]


def _window(match: Matches, rank: int, *, width: int, height: int) -> list[int]:
    """Returns `x, y, width, height` of a crop with the box, its object and two stds, with a margin."""
    corners = [match.boxes[rank]]
    if match.object_index[rank] >= 0:
        corners.append(match.objects.boxes[match.object_index[rank]])
    low = np.min([box[:2] for box in corners], axis=0)
    high = np.max([box[2:] for box in corners], axis=0)
    if match.stds is not None:
        reach = np.minimum(2 * match.stds[rank], np.tile(high - low, 2))
        low, high = low - reach[:2], high + reach[2:]
    size = np.array([width, height])
    side = np.minimum(max(1.2 * (high - low).max(), _MIN_WINDOW), size)
    start = np.clip((low + high - side) / 2, 0, size - side)
    x, y = np.floor(start).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(start + side), size).astype(int).tolist()
    return [x, y, right - x, bottom - y]


def _own_objects(match: Matches, rank: int, objects: list[list]) -> list[list]:
    """Returns the object that a detection is matched with; all objects of the image if there is none."""
    if match.object_index[rank] < 0:
        return objects
    corners = match.objects.boxes[match.object_index[rank]].round(1).tolist()
    return [row for row in objects if row[:4] == corners]


def _object_rows(truth: dict, class_index: dict[int, int]) -> dict[int, list[list]]:
    rows: dict[int, list[list]] = {}
    for entry in truth["annotations"]:
        x, y, width, height = entry["bbox"]
        corners = [round(float(value), 1) for value in (x, y, x + width, y + height)]
        row = [*corners, class_index[entry["category_id"]], int(entry.get("iscrowd", 0))]
        rows.setdefault(entry["image_id"], []).append(row)
    return rows


def _detection_rows(
    run: Run, match: Matches, class_index: dict[int, int]
) -> dict[int, list[tuple[int, list]]]:
    """Returns rank and row of every detection by image id, best scores first."""
    columns = [
        *match.boxes.round(1).T.tolist(),
        match.scores.round(4).tolist(),
        [class_index[category] for category in match.category_ids.tolist()],
        match.kind.tolist(),
        match.iou.round(2).tolist(),
        *([] if match.stds is None else match.stds.round(2).T.tolist()),
    ]
    rows: dict[int, list[tuple[int, list]]] = {}
    for rank, row in enumerate(zip(*columns, strict=True)):
        image_id = run.detections[match.result_index[rank]]["image_id"]
        rows.setdefault(image_id, []).append((rank, list(row)))
    return rows


def _sigma_limits(matches: Sequence[Matches]) -> dict[str, float] | None:
    """Returns limits above nearly all sigmas; a few outliers would make the slider too coarse."""
    with_stds = [match for match in matches if match.stds is not None and len(match.stds)]
    if not with_stds:
        return None
    pixels = np.concatenate([match.stds.mean(axis=1) for match in with_stds])
    relative = np.concatenate([relative_sigma(match.boxes, match.stds) for match in with_stds])
    return {
        "px": float(np.ceil(np.quantile(pixels, 0.995) + 0.1)),
        "relative": float(np.ceil(np.quantile(relative, 0.995) * 20 + 0.1) / 20),
    }


def _pictures(source: Any, chosen: list[int], crops: list[tuple[int, list[int]]]) -> dict[str, list[str]]:
    """Returns data URIs of the chosen images and of the crops; reads every image once."""
    wanted: dict[int, list[int]] = {index: [] for index in chosen}
    for number, (index, _) in enumerate(crops):
        wanted.setdefault(index, []).append(number)
    whole, parts = {}, [""] * len(crops)
    is_chosen = set(chosen)
    picture_side = next(side for side, limit in _PICTURE_SIDES if len(chosen) <= limit)
    for index, numbers in sorted(wanted.items()):
        image = source.load_image(index)
        if index in is_chosen:
            whole[index] = _data_uri(image, side=picture_side, quality=_PICTURE_QUALITY)
        for number in numbers:
            x, y, width, height = crops[number][1]
            crop = image[y : y + height, x : x + width]
            parts[number] = _data_uri(crop, side=_CROP_SIDE, quality=_CROP_QUALITY)
    return {"images": [whole[index] for index in chosen], "crops": parts}


def _data_uri(image: UInt8[ndarray, "h w 3"], *, side: int, quality: int) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
