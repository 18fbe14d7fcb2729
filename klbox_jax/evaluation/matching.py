"""Which detection found which object: the partition that the uncertainty scores are taken over.

As probdet has it (Harakeh & Waslander 2021): true positives, duplicates, localization errors, false
positives. It differs on purpose in three things. Only objects of the detection's own class count; the order
of the annotations plays no part, because best scores choose first, as for average precision; crowds are no
objects, and what lies in one is not counted. So the true positives are exactly those of COCO's AP at the
same IoU threshold.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

TRUE_POSITIVE, DUPLICATE, LOCALIZATION_ERROR, FALSE_POSITIVE, IGNORED = range(5)


@dataclasses.dataclass(frozen=True)
class Objects:
    """The annotated objects, without crowds; boxes are `x1, y1, x2, y2` in pixels.

    Attributes:
        boxes: from `bbox`; what detections are matched with, and the best box there is of the object.
        labels: from `bbox_noisy`, the box as annotated; where there is none, `boxes`.
        label_stds: from `bbox_std`, the std of the label noise of each edge; NaN where there is none.
        category_ids: the data set's own.
    """

    boxes: Float[ndarray, "G 4"]
    labels: Float[ndarray, "G 4"]
    label_stds: Float[ndarray, "G 4"]
    category_ids: Int[ndarray, " G"]


@dataclasses.dataclass(frozen=True)
class Matches:
    """What became of each detection; best scores first, ties in the order of the results.

    Attributes:
        result_index: the detection's position in the list of results.
        boxes: `x1, y1, x2, y2` in pixels.
        scores: as given.
        stds: of the four edges in pixels, or None where the results have none.
        category_ids: the data set's own.
        kind: TRUE_POSITIVE, DUPLICATE (its object is found already), LOCALIZATION_ERROR, FALSE_POSITIVE or
            IGNORED (finds nothing, but lies in a crowd).
        object_index: row of `objects`; -1 for the last two kinds.
        iou: with that object; 0 without one.
        objects: all objects, found or not.
    """

    result_index: Int[ndarray, " D"]
    boxes: Float[ndarray, "D 4"]
    scores: Float[ndarray, " D"]
    stds: Float[ndarray, "D 4"] | None
    category_ids: Int[ndarray, " D"]
    kind: Int[ndarray, " D"]
    object_index: Int[ndarray, " D"]
    iou: Float[ndarray, " D"]
    objects: Objects


def match_detections(
    ground_truth: dict,
    results: list[dict],
    *,
    iou_threshold: float = 0.5,
    background_iou: float = 0.1,
    min_score: float = 0.0,
) -> Matches:
    """Matches detections with objects of their image and class.

    Best scores first, a detection takes the free object that it overlaps most, if the IoU reaches
    `iou_threshold`. One that could only have a taken object is a duplicate of the one it overlaps most. Of the
    others, one whose best IoU is above `background_iou` is a localization error of that object, and the rest are
    false positives. One that is no true positive and has a share of `iou_threshold` of its area in a crowd is
    ignored.

    Args:
        ground_truth: COCO dictionary; an annotation may have `bbox_noisy` and `bbox_std` beside `bbox`.
        results: as `klbox_jax.evaluation.coco.to_coco_results` makes them; all have `bbox_std`, or none.
        iou_threshold: above 0, up to 1.
        background_iou: from 0, below `iou_threshold`.
        min_score: detections with less are left out.

    Raises:
        ValueError: an entry lacks a field, is not finite, has a negative std or names an unknown image or
            category; or thresholds do not fit.
    """
    if not 0 <= background_iou < iou_threshold <= 1:
        raise ValueError(
            "0 <= background_iou < iou_threshold <= 1 is needed; "
            f"they are {background_iou} and {iou_threshold}"
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
    stds = numbers(kept, "bbox_std") if results and "bbox_std" in results[0] else None

    rows, columns = _pairs_of_a_kind(kept, singles)
    ious = _ious(boxes[rows], objects.boxes[columns])
    object_index = _take_best_first(rows, columns, ious, len(kept), len(singles), iou_threshold)
    found = object_index >= 0

    nearest, best_iou = _nearest(rows, columns, ious, len(kept))
    kind = np.select(
        [found, best_iou >= iou_threshold, best_iou > background_iou],
        [TRUE_POSITIVE, DUPLICATE, LOCALIZATION_ERROR],
        default=FALSE_POSITIVE,
    )
    kind[~found & in_crowd(kept, crowds, share=iou_threshold)] = IGNORED
    object_index = np.where(found, object_index, nearest)
    object_index[kind >= FALSE_POSITIVE] = -1
    taken_iou = np.zeros(len(kept))
    here = object_index[rows] == columns
    taken_iou[rows[here]] = ious[here]
    return Matches(
        result_index=order,
        boxes=boxes,
        scores=scores[order],
        stds=stds,
        category_ids=np.array([entry["category_id"] for entry in kept], np.int64),
        kind=kind,
        object_index=object_index,
        iou=taken_iou,
        objects=objects,
    )


def max_f1_score_threshold(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5
) -> float | None:
    """Returns the score from which on detections count for the highest F1, all classes together.

    F1 is 2 TP / (detections + objects), a duplicate being as wrong as a false positive; of equal maxima the
    highest score. None without objects or results. probdet takes the mean over classes of thresholds found on
    COCO's recall grid; this is the threshold of one F1, at one IoU. Choose it on other images than those whose
    scores are reported.
    """
    matches = match_detections(ground_truth, results, iou_threshold=iou_threshold)
    counted = matches.kind != IGNORED
    scores, hits = matches.scores[counted], np.cumsum(matches.kind[counted] == TRUE_POSITIVE)
    if not len(scores) or not len(matches.objects.boxes):
        return None
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + len(matches.objects.boxes))
    last_of_tie = np.append(scores[1:] < scores[:-1], True)  # a threshold lets a whole tie in
    return float(scores[last_of_tie][np.argmax(f1[last_of_tie])])


def check_entries(ground_truth: dict, results: list[dict]) -> None:
    """Raises ValueError for the first annotation or result that cannot be evaluated, naming it."""
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    with_stds = bool(results) and "bbox_std" in results[0]
    for name, entries in (("annotations", ground_truth["annotations"]), ("results", results)):
        for i, entry in enumerate(entries):
            for key, known in (("image_id", image_ids), ("category_id", category_ids)):
                if key not in entry or entry[key] not in known:
                    raise ValueError(f"{name}[{i}]: {key} {entry.get(key)} is not in the ground truth")
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
                f"results[{i}] {'lacks' if with_stds else 'has'} bbox_std, unlike results[0]; all have it or none"
            )


def corners(entries: list[dict], key: str) -> Float[ndarray, "n 4"]:
    """Boxes of COCO entries, `[x, y, width, height]`, as `x1, y1, x2, y2`."""
    boxes = numbers(entries, key)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def numbers(entries: list[dict], key: str) -> Float[ndarray, "n 4"]:
    """The four numbers of a field of every entry."""
    return np.array([entry[key] for entry in entries], np.float64).reshape(len(entries), 4)


def in_crowd(detections: list[dict], crowds: list[dict], *, share: float) -> Bool[ndarray, " D"]:
    """True for a detection that has at least `share` of its area in one crowd of its image and class."""
    boxes = corners(detections, "bbox")
    rows, columns = _pairs_of_a_kind(detections, crowds)
    inside = _intersections(boxes[rows], corners(crowds, "bbox")[columns])
    areas = _areas(boxes[rows])
    lies_inside = np.zeros(len(detections), bool)
    lies_inside[rows[(areas > 0) & (inside >= share * areas)]] = True
    return lies_inside


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
        category_ids=np.array([entry["category_id"] for entry in annotations], np.int64),
    )


def _pairs_of_a_kind(
    detections: list[dict], annotations: list[dict]
) -> tuple[Int[ndarray, " P"], Int[ndarray, " P"]]:
    """Every pair of a detection and an annotation of one image and class, ordered by detection."""
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
    """IoU of row with row in float64, as COCO's evaluator has it; two empty boxes have 0."""
    shared = _intersections(a, b)
    union = _areas(a) + _areas(b) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _take_best_first(
    rows: Int[ndarray, " P"],
    columns: Int[ndarray, " P"],
    ious: Float[ndarray, " P"],
    num_detections: int,
    num_objects: int,
    iou_threshold: float,
) -> Int[ndarray, " D"]:
    """The object each detection takes, or -1. A plain loop over the few pairs that reach the threshold."""
    reaching = np.flatnonzero(ious >= iou_threshold)
    reaching = reaching[np.lexsort((-ious[reaching], rows[reaching]))]
    taken = [-1] * num_detections
    is_free = [True] * num_objects
    for row, column in zip(rows[reaching].tolist(), columns[reaching].tolist(), strict=True):
        if taken[row] < 0 and is_free[column]:
            taken[row], is_free[column] = column, False
    return np.array(taken, np.int64)


def _nearest(
    rows: Int[ndarray, " P"], columns: Int[ndarray, " P"], ious: Float[ndarray, " P"], num_detections: int
) -> tuple[Int[ndarray, " D"], Float[ndarray, " D"]]:
    """The object each detection overlaps most and the IoU with it; -1 and 0 where there is none."""
    nearest, best = np.full(num_detections, -1), np.zeros(num_detections)
    order = np.lexsort((ious, rows))
    nearest[rows[order]], best[rows[order]] = columns[order], ious[order]  # of a row, the last stays
    return nearest, best
