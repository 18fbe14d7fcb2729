"""COCO average precision of boxes and masks, by pycocotools or a faster library with the same numbers.

pycocotools matches and accumulates; the summary is computed here from its raw arrays. pycocotools' own summary looks up
thresholds with `==`, which misses 0.9 (stored as 0.8999999999999999, so AP90 is reported as -1), and it always reads
100 detections per image, even if another limit was set.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from klbox_jax.evaluation import fast_coco
from klbox_jax.evaluation.coco_data import EvaluatorData, category_names, check_results, evaluator_data
from klbox_jax.evaluation.masks import encode_masks
from klbox_jax.structures import AnyArray, Detections

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Indices into IOU_THRESHOLDS, because 0.9 is not stored as 0.9.
_NAMED_THRESHOLDS = {"AP50": 0, "AP60": 2, "AP70": 4, "AP75": 5, "AP80": 6, "AP90": 8}
_AREAS = ("all", "small", "medium", "large")
BACKENDS = ("pycocotools", "hotcoco")


def to_coco_results(
    detections: Detections,
    image_ids: Int[AnyArray, " B"],
    image_valid: Bool[AnyArray, " B"],
    category_ids: Sequence[int],
    *,
    image_sizes: Int[AnyArray, "B 2"] | None = None,
) -> list[dict]:
    """Converts the detections of a batch to entries of a COCO results file, with a std for each box edge.

    Rounding does not change AP: scores and stds keep all digits of float32 (so their order stays), and boxes are
    rounded to 1e-4 pixels, about the resolution of float32 in an image 1000 pixels wide.

    Args:
        detections: batched (`[B, D]`), in pixels of the file.
        image_ids: id of each image in its data set.
        image_valid: False for an image that only fills up the batch; it gives no entry.
        category_ids: the data set's category id of each dense class index.
        image_sizes: height and width of each file in pixels; required for detections with masks.

    Returns:
        One entry for each valid detection, best scores first within an image, as plain Python numbers and strings:
        `image_id`, `category_id`, `bbox` (`[x, y, width, height]`) and `score`. Further fields depend on the detector:
        `bbox_std`, the stds of `[x1, y1, x2, y2]` in pixels, if it has variances; `predicted_iou` if it has an IoU
        head; `segmentation`, the compressed run lengths of the whole image, if it has masks.
    """
    valid = np.asarray(detections.valid) & np.asarray(image_valid)[:, None]
    rows, _ = np.nonzero(valid)
    boxes = np.asarray(detections.boxes, np.float64)[valid]
    sizes = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
    classes = np.asarray(detections.classes)[valid].tolist()
    fields = {
        "image_id": np.asarray(image_ids)[rows].tolist(),
        "category_id": [int(category_ids[index]) for index in classes],
        "bbox": np.concatenate([boxes[:, :2], sizes], axis=1).round(4).tolist(),
        "score": _shortest_decimals(np.asarray(detections.scores)[valid]),
    }
    if detections.box_stds is not None:
        fields["bbox_std"] = _shortest_decimals(np.asarray(detections.box_stds)[valid])
    if detections.predicted_ious is not None:
        fields["predicted_iou"] = _shortest_decimals(np.asarray(detections.predicted_ious)[valid])
    if detections.masks is not None:
        fields["segmentation"] = _encode_batch_masks(detections, valid, image_sizes)
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def _encode_batch_masks(
    detections: Detections, valid: Bool[ndarray, "B D"], image_sizes: Int[AnyArray, "B 2"]
) -> list[dict]:
    return [
        mask
        for image, (height, width) in enumerate(np.asarray(image_sizes).tolist())
        for mask in encode_masks(
            np.asarray(detections.masks)[image][valid[image]],
            np.asarray(detections.boxes)[image][valid[image]],
            height=height,
            width=width,
        )
    ]


def _shortest_decimals(values: ndarray) -> list:
    """Returns floats with the shortest decimal form that gives the same float32."""
    return values.astype(np.float32).astype(str).astype(np.float64).tolist()


def evaluate_detections(
    ground_truth: dict,
    results: list[dict],
    *,
    iou_type: str = "bbox",
    max_detections: int = 100,
    backend: str = "pycocotools",
) -> dict:
    """Computes average precision and recall by the COCO protocol, in per cent.

    The arguments are not changed. Ids of images and categories may be any numbers or texts. A quantity without ground
    truth (a class that no image shows, a size range without objects) is None, and such a class is left out of every
    mean.

    Args:
        ground_truth: COCO dictionary with `images`, `categories` and `annotations`. An annotation without `iscrowd` is
            a single object; without `area`, the area of its box or mask is used.
        results: entries as made by `to_coco_results`; may be empty. Best scores count first, ties in the order of the
            list. Their size is that of the box or mask; an `area` in a results file is ignored.
        iou_type: "bbox" for boxes, "segm" for masks. For masks every annotation and every result must have a
            `segmentation` in one of COCO's forms, and every image its `height` and `width`.
        max_detections: number of detections of each image and class that count.
        backend: library that matches and accumulates: pycocotools, or hotcoco, which the extra `fast` installs.

    Returns:
        `AP` (mean over IoU 0.50 to 0.95), `AP50`, `AP60`, `AP70`, `AP75`, `AP80`, `AP90`; `AP_small`, `AP_medium`,
        `AP_large` (areas up to 32^2, up to 96^2, above); `AR1`, `AR10`, `AR100` (the last is named after
        `max_detections`, and larger limits are left out); `AP_by_iou`, ten numbers for IoU 0.50, 0.55, ..., 0.95;
        `AP_by_class`, AP by category name (`name (id)` if two share a name).

    Raises:
        ValueError: a result names an unknown image or category, or is not finite; a mask is malformed; the area of an
            annotation is not a finite number; the back end is unknown or not installed.
    """
    check_backend(backend)
    _check(ground_truth, results, iou_type=iou_type, max_detections=max_detections)
    limits = _limits(max_detections)
    data = evaluator_data(ground_truth, results, iou_type)
    precision, recall = _accumulate(data, iou_type=iou_type, limits=limits, backend=backend)
    # Precision by IoU threshold, recall level, class, area; recall by IoU threshold, class, area, limit.
    precision = precision[..., -1]

    metrics = {"AP": _mean(precision[..., 0])}
    metrics |= {name: _mean(precision[i, ..., 0]) for name, i in _NAMED_THRESHOLDS.items()}
    metrics |= {f"AP_{area}": _mean(precision[..., i]) for i, area in enumerate(_AREAS) if i > 0}
    metrics |= {f"AR{limit}": _mean(recall[:, :, 0, i]) for i, limit in enumerate(limits)}
    metrics["AP_by_iou"] = [_mean(row) for row in precision[..., 0]]
    names = category_names(ground_truth)
    metrics["AP_by_class"] = {
        names[category_id]: _mean(precision[:, :, k, 0]) for k, category_id in enumerate(data.category_ids)
    }
    return metrics


def _accumulate(
    data: EvaluatorData, *, iou_type: str, limits: list[int], backend: str
) -> tuple[Float[ndarray, "t r k a m"], Float[ndarray, "t k a m"]]:
    """Returns precision and recall of `COCOeval.eval` from either back end, classes in the order of their ids."""
    if backend == "hotcoco":
        return fast_coco.accumulate(
            data.truth, data.found, iou_type=iou_type, iou_thresholds=IOU_THRESHOLDS.tolist(), limits=limits
        )
    evaluator = _matched(data, iou_type, limits)
    with _silence():
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def check_backend(name: str) -> None:
    """Raises ValueError if a back end of `evaluate_detections` is unknown or not installed."""
    if name not in BACKENDS:
        raise ValueError(
            f"config.evaluation.coco_backend = {name!r} is unknown; choose {' or '.join(BACKENDS)}"
        )
    if name == "hotcoco":
        fast_coco.check_installed()


def coco_evaluator(
    ground_truth: dict, results: list[dict], *, iou_type: str = "bbox", max_detections: int = 100
) -> COCOeval:
    """Returns pycocotools' evaluator after matching all images, before accumulation.

    Arguments and errors are those of `evaluate_detections`.
    """
    _check(ground_truth, results, iou_type=iou_type, max_detections=max_detections)
    return _matched(evaluator_data(ground_truth, results, iou_type), iou_type, _limits(max_detections))


def _check(ground_truth: dict, results: list[dict], *, iou_type: str, max_detections: int) -> None:
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f"iou_type = {iou_type!r} is unknown; choose bbox or segm")
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, not {max_detections}")
    check_results(ground_truth, results)


def _limits(max_detections: int) -> list[int]:
    return [limit for limit in (1, 10) if limit < max_detections] + [max_detections]


def _matched(data: EvaluatorData, iou_type: str, limits: list[int]) -> COCOeval:
    with _silence():
        evaluator = COCOeval(_indexed(data.truth), None, iou_type)
        evaluator.cocoDt = _indexed(data.found)
        evaluator.params.iouThrs = IOU_THRESHOLDS
        evaluator.params.maxDets = limits
        evaluator.evaluate()
    return evaluator


def _indexed(data_set: dict) -> COCO:
    data = COCO()
    data.dataset = data_set
    data.createIndex()
    return data


def _silence() -> contextlib.redirect_stdout:
    # pycocotools prints its progress to stdout.
    return contextlib.redirect_stdout(io.StringIO())


def _mean(values: ndarray) -> float | None:
    present = values[values > -1]
    # The evaluator adds 2e-16 to denominators; rounding to ten decimals gives a perfect class exactly 100.
    return round(100.0 * float(present.mean()), 10) if present.size else None
