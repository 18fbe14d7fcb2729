"""Error types of detections by TIDE (Bolya et al., ECCV 2020), computed by `hotcoco`.

The error of a type is the gain in AP if all errors of the type were fixed. It needs the extra `fast`.
"""

from klbox_jax.evaluation.coco_data import category_names, check_results, evaluator_data
from klbox_jax.evaluation.fast_coco import check_installed, tide_errors

# Wrong class, bad box, both, duplicate, background, missed object; and all false positives, all missed objects.
ERROR_TYPES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN")


def evaluate_tide(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5, background_iou: float = 0.1
) -> dict:
    """Computes the error types of box detections over all classes and for each class.

    The numbers of a class are of its detections and objects alone. So its false positives on objects of other classes,
    `Cls` and `Both` over all classes, are part of its `Bkg`.

    Args:
        ground_truth: COCO dictionary.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`.
        iou_threshold: least IoU of a true positive.
        background_iou: largest IoU of a false positive on background.

    Returns:
        `AP`, in per cent at `iou_threshold`; the gain in AP of each of `ERROR_TYPES`, in points; `counts`, the number
        of errors of each type except `FP` and `FN`. `by_class`: the same without `Cls` and `Both` for each class by its
        name (`name (id)` if two share a name); None for a class without objects.

    Raises:
        ValueError: hotcoco is not installed, or a result names an unknown image or category, or is not finite.
    """
    check_installed()
    check_results(ground_truth, results)
    data = evaluator_data(ground_truth, results, "bbox")
    names = category_names(ground_truth)
    thresholds = {"iou_threshold": iou_threshold, "background_iou": background_iou}
    by_class = {}
    for number, category_id in enumerate(data.category_ids, start=1):
        truth, found = (_of_category(one, number) for one in (data.truth, data.found))
        has_objects = not all(entry["iscrowd"] for entry in truth["annotations"])
        errors = _errors(truth, found, thresholds) if has_objects else None
        if errors is not None:
            for name in ("Cls", "Both"):  # not defined without the other classes
                del errors[name], errors["counts"][name]
        by_class[names[category_id]] = errors
    return _errors(data.truth, data.found, thresholds) | {"by_class": by_class}


def _of_category(data_set: dict, number: int) -> dict:
    annotations = [entry for entry in data_set["annotations"] if entry["category_id"] == number]
    categories = [entry for entry in data_set["categories"] if entry["id"] == number]
    return data_set | {"annotations": annotations, "categories": categories}


def _errors(truth: dict, found: dict, thresholds: dict[str, float]) -> dict:
    errors = tide_errors(truth, found, **thresholds)
    counts = {name: int(errors["counts"][name]) for name in ERROR_TYPES if name in errors["counts"]}
    gains = {name: 100 * errors["delta_ap"][name] for name in ERROR_TYPES}
    return {"AP": 100 * errors["ap_base"], **gains, "counts": counts}
