"""Matching of detections with objects, and the partition of detections that the uncertainty scores use.

The partition follows probdet (Harakeh & Waslander 2021): true positives, duplicates, localization errors and false
positives. It differs on purpose in three points. Only objects of the detection's own class count. The order of the
annotations has no effect, because the best scores choose first, as in average precision. Crowds are not objects, and
unmatched detections inside them are not counted. So the true positives are exactly those of COCO's AP at the same IoU
threshold.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray

TRUE_POSITIVE, DUPLICATE, LOCALIZATION_ERROR, FALSE_POSITIVE, IGNORED = range(5)


@dataclasses.dataclass(frozen=True)
class Objects:
    """Annotated objects without crowds; boxes are `x1, y1, x2, y2` in pixels.

    Attributes:
        boxes: from `bbox`, the most exact box of the object; used for matching.
        labels: from `bbox_noisy`, the box as annotated; equal to `boxes` if there is none.
        label_stds: from `bbox_std`, the std of the label noise of each edge; NaN if there is none.
        category_ids: the data set's own.
    """

    boxes: Float[ndarray, "G 4"]
    labels: Float[ndarray, "G 4"]
    label_stds: Float[ndarray, "G 4"]
    category_ids: Shaped[ndarray, " G"]


@dataclasses.dataclass(frozen=True)
class Matches:
    """Detections with the kind and the object of each; best scores first, ties in the order of the results.

    Attributes:
        result_index: position of the detection in the list of results.
        boxes: `x1, y1, x2, y2` in pixels.
        scores: as in the results.
        stds: of the four edges in pixels; None if the results have none.
        category_ids: the data set's own.
        kind: TRUE_POSITIVE, DUPLICATE (a better detection took its object), LOCALIZATION_ERROR, FALSE_POSITIVE or
            IGNORED (no true positive, and inside a crowd).
        object_index: row in `objects`; -1 for false positives and ignored detections.
        iou: with that object; 0 without one.
        objects: all objects, matched or not.
    """

    result_index: Int[ndarray, " D"]
    boxes: Float[ndarray, "D 4"]
    scores: Float[ndarray, " D"]
    stds: Float[ndarray, "D 4"] | None
    category_ids: Shaped[ndarray, " D"]
    kind: Int[ndarray, " D"]
    object_index: Int[ndarray, " D"]
    iou: Float[ndarray, " D"]
    objects: Objects


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """All pairs of a detection and an object of the same image and class, ordered by detection."""

    detection: Int[ndarray, " P"]
    object: Int[ndarray, " P"]
    iou: Float[ndarray, " P"]
    num_detections: int
    num_objects: int


def match_detections(
    ground_truth: dict,
    results: list[dict],
    *,
    iou_threshold: float = 0.5,
    background_iou: float = 0.1,
    min_score: float = 0.0,
) -> Matches:
    """Matches detections with objects of their image and class.

    In order of descending score, a detection takes the free object of the largest IoU, if that is at least
    `iou_threshold`. A detection for which only taken objects remain is a duplicate. Of the others, a detection whose
    largest IoU is above `background_iou` is a localization error, and the rest are false positives. Duplicates and
    localization errors refer to the object they overlap most. A detection that is no true positive, and has at least
    `iou_threshold` of its area in a crowd, is ignored.

    Args:
        ground_truth: COCO dictionary; an annotation may have `bbox_noisy` and `bbox_std` in addition to `bbox`.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`; all have `bbox_std`, or none.
        iou_threshold: least IoU of a true positive, above 0, up to 1.
        background_iou: largest IoU of a false positive, from 0, below `iou_threshold`.
        min_score: detections with a lower score are left out.

    Raises:
        ValueError: an entry lacks a field, is not finite, has a negative std or names an unknown image or
            category; or the thresholds are out of range.
    """
    if not 0 <= background_iou < iou_threshold <= 1:
        raise ValueError(
            "0 <= background_iou < iou_threshold <= 1 is required, "
            f"but they are {background_iou} and {iou_threshold}"
        )
    check_entries(ground_truth, results)
    annotations = ground_truth["annotations"]
    crowds = [entry for entry in annotations if entry.get("iscrowd", 0)]
    singles = [entry for entry in annotations if not entry.get("iscrowd", 0)]
    objects = _objects(singles)

    scores = np.array([entry["score"] for entry in results], np.float64)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= min_score]
    kept = [results[i] for i in order]
    boxes = corners(kept, "bbox")

    rows, columns = _same_class_pairs(kept, singles)
    pairs = _Pairs(rows, columns, _ious(boxes[rows], objects.boxes[columns]), len(kept), len(singles))
    is_in_crowd = in_crowd(kept, crowds, share=iou_threshold)
    kind, object_index = _classify(
        pairs, is_in_crowd, iou_threshold=iou_threshold, background_iou=background_iou
    )
    return Matches(
        result_index=order,
        boxes=boxes,
        scores=scores[order],
        stds=numbers(kept, "bbox_std") if results and "bbox_std" in results[0] else None,
        category_ids=_category_ids(kept),
        kind=kind,
        object_index=object_index,
        iou=_iou_with(object_index, pairs),
        objects=objects,
    )


def max_f1_score_threshold(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5
) -> float | None:
    """Returns the score threshold of the highest F1 over all classes; None without objects or results.

    F1 is 2 TP / (detections + objects); a duplicate counts like a false positive. Of equal maxima the highest score is
    returned. probdet averages thresholds of the classes found on COCO's recall grid; this is the threshold of one F1 at
    one IoU. Choose it on other images than those whose scores are reported.
    """
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold)
    counted = matches.kind != IGNORED
    scores, hits = matches.scores[counted], np.cumsum(matches.kind[counted] == TRUE_POSITIVE)
    if not len(scores) or not len(matches.objects.boxes):
        return None
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + len(matches.objects.boxes))
    last_of_tie = np.append(scores[1:] < scores[:-1], True)  # a threshold keeps all detections of equal score
    return float(scores[last_of_tie][np.argmax(f1[last_of_tie])])


def check_entries(ground_truth: dict, results: list[dict]) -> None:
    """Raises ValueError that names the first annotation or result that cannot be evaluated."""
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    with_stds = bool(results) and "bbox_std" in results[0]
    for name, entries in (("annotations", ground_truth["annotations"]), ("results", results)):
        for i, entry in enumerate(entries):
            for key, known in (("image_id", image_ids), ("category_id", category_ids)):
                if key not in entry or entry[key] not in known:
                    raise ValueError(f"{name}[{i}]: {key} {entry.get(key)!r} is not in the ground truth")
            for key in ("bbox", "bbox_noisy", "bbox_std"):
                if key in entry or key == "bbox":
                    values = entry.get(key)
                    if not _are_finite(values, count=4):
                        raise ValueError(f"{name}[{i}]: {key} must be four finite numbers, not {values}")
            if "bbox_std" in entry and min(entry["bbox_std"]) < 0:
                raise ValueError(f"{name}[{i}]: bbox_std {entry['bbox_std']} has a negative number")
    for i, entry in enumerate(results):
        if not _are_finite([entry.get("score")], count=1):
            raise ValueError(f"results[{i}]: score must be a finite number, not {entry.get('score')}")
        if ("bbox_std" in entry) != with_stds:
            raise ValueError(
                f"results[{i}] {'lacks' if with_stds else 'has'} bbox_std, unlike results[0]; "
                "all results must have it, or none"
            )


def corners(entries: list[dict], key: str) -> Float[ndarray, "n 4"]:
    """Converts boxes of COCO entries, `[x, y, width, height]`, to `x1, y1, x2, y2`."""
    boxes = numbers(entries, key)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def numbers(entries: list[dict], key: str) -> Float[ndarray, "n 4"]:
    """Returns a field of four numbers of every entry."""
    return np.array([entry[key] for entry in entries], np.float64).reshape(len(entries), 4)


def in_crowd(detections: list[dict], crowds: list[dict], *, share: float) -> Bool[ndarray, " D"]:
    """Returns True for each detection with at least `share` of its area in one crowd of its image and class."""
    boxes = corners(detections, "bbox")
    rows, columns = _same_class_pairs(detections, crowds)
    inside = _intersections(boxes[rows], corners(crowds, "bbox")[columns])
    areas = _areas(boxes[rows])
    is_inside = np.zeros(len(detections), bool)
    is_inside[rows[(areas > 0) & (inside >= share * areas)]] = True
    return is_inside


def _are_finite(values: Any, *, count: int) -> bool:
    try:
        return len(values) == count and all(map(math.isfinite, values))
    except TypeError:
        return False


def _objects(annotations: list[dict]) -> Objects:
    unknown = [math.nan] * 4
    return Objects(
        boxes=corners(annotations, "bbox"),
        labels=corners([{"box": entry.get("bbox_noisy", entry["bbox"])} for entry in annotations], "box"),
        label_stds=numbers([{"std": entry.get("bbox_std", unknown)} for entry in annotations], "std"),
        category_ids=_category_ids(annotations),
    )


def _category_ids(entries: list[dict]) -> Shaped[ndarray, " n"]:
    """Returns the category ids as integers, or as objects if the data set uses texts."""
    ids = [entry["category_id"] for entry in entries]
    return np.array(ids, object if any(isinstance(value, str) for value in ids) else np.int64)


def _same_class_pairs(
    detections: list[dict], annotations: list[dict]
) -> tuple[Int[ndarray, " P"], Int[ndarray, " P"]]:
    """Returns indices of all pairs of a detection and an annotation of the same image and class."""
    groups: dict[tuple, list[int]] = {}
    for column, entry in enumerate(annotations):
        groups.setdefault((entry["image_id"], entry["category_id"]), []).append(column)
    partners = [groups.get((entry["image_id"], entry["category_id"]), ()) for entry in detections]
    counts = np.array([len(columns) for columns in partners], np.int64)
    rows = np.repeat(np.arange(len(detections)), counts)
    return rows, np.array([column for columns in partners for column in columns], np.int64)


def _intersections(a: Float[ndarray, "n 4"], b: Float[ndarray, "n 4"]) -> Float[ndarray, " n"]:
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    return np.prod(np.maximum(sides, 0.0), axis=1)


def _areas(boxes: Float[ndarray, "n 4"]) -> Float[ndarray, " n"]:
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=1)


def _ious(a: Float[ndarray, "n 4"], b: Float[ndarray, "n 4"]) -> Float[ndarray, " n"]:
    """Returns the row-wise IoU of `a` and `b` in float64, like COCO's evaluator; 0 if both are empty."""
    shared = _intersections(a, b)
    union = _areas(a) + _areas(b) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _classify(
    pairs: _Pairs, is_in_crowd: Bool[ndarray, " D"], *, iou_threshold: float, background_iou: float
) -> tuple[Int[ndarray, " D"], Int[ndarray, " D"]]:
    """Returns the kind of each detection, and the index of its object or -1."""
    taken_object = _assign_greedily(pairs, iou_threshold)
    nearest_object, nearest_iou = _nearest_objects(pairs)
    kind = np.select(
        [taken_object >= 0, nearest_iou >= iou_threshold, nearest_iou > background_iou],
        [TRUE_POSITIVE, DUPLICATE, LOCALIZATION_ERROR],
        default=FALSE_POSITIVE,
    )
    kind[(taken_object < 0) & is_in_crowd] = IGNORED
    object_index = np.where(taken_object >= 0, taken_object, nearest_object)
    object_index[kind >= FALSE_POSITIVE] = -1
    return kind, object_index


def _assign_greedily(pairs: _Pairs, iou_threshold: float) -> Int[ndarray, " D"]:
    """Returns the object that each detection takes, or -1; a plain loop over the few pairs above the threshold."""
    candidates = np.flatnonzero(pairs.iou >= iou_threshold)
    candidates = candidates[np.lexsort((-pairs.iou[candidates], pairs.detection[candidates]))]
    taken = [-1] * pairs.num_detections
    is_free = [True] * pairs.num_objects
    rows, columns = pairs.detection[candidates].tolist(), pairs.object[candidates].tolist()
    for row, column in zip(rows, columns, strict=True):
        if taken[row] < 0 and is_free[column]:
            taken[row], is_free[column] = column, False
    return np.array(taken, np.int64)


def _nearest_objects(pairs: _Pairs) -> tuple[Int[ndarray, " D"], Float[ndarray, " D"]]:
    """Returns the object of the largest IoU with each detection, and that IoU; -1 and 0 without one."""
    nearest, best = np.full(pairs.num_detections, -1), np.zeros(pairs.num_detections)
    order = np.lexsort((pairs.iou, pairs.detection))
    # Of several values assigned to one index, the last, which has the largest IoU, stays.
    nearest[pairs.detection[order]], best[pairs.detection[order]] = pairs.object[order], pairs.iou[order]
    return nearest, best


def _iou_with(object_index: Int[ndarray, " D"], pairs: _Pairs) -> Float[ndarray, " D"]:
    """Returns the IoU of each detection with its object; 0 without one."""
    iou = np.zeros(pairs.num_detections)
    is_own = object_index[pairs.detection] == pairs.object
    iou[pairs.detection[is_own]] = pairs.iou[is_own]
    return iou
