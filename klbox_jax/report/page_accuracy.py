"""Accuracy of a run by class: precision-recall curves, error types and confusions."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from numpy import ndarray

from klbox_jax.evaluation.coco_data import category_names
from klbox_jax.evaluation.confusion import confusion_matrix
from klbox_jax.evaluation.fast_coco import is_installed
from klbox_jax.evaluation.precision_recall import precision_by_class
from klbox_jax.evaluation.tide import evaluate_tide
from klbox_jax.report.page_data import Run

IOU_THRESHOLDS = (0.5, 0.75, 0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """Accuracy of one run on its data set.

    Attributes:
        class_names: in the order of the category ids.
        precision: by IoU threshold and class name, the precision at 101 recalls; None for a class without objects.
        errors: result of `klbox_jax.evaluation.tide.evaluate_tide`; None if hotcoco is not installed.
        confusion: result of `klbox_jax.evaluation.confusion.confusion_matrix`.
    """

    class_names: Sequence[str]
    precision: Mapping[float, Mapping[str, Float[ndarray, "101"] | None]]
    errors: dict | None
    confusion: Int[ndarray, "k k"]


def measure_accuracy(run: Run, ground_truth: dict) -> ClassAccuracy:
    """Computes the accuracy by class of a run's detections.

    Raises:
        ValueError: the detections do not belong to the ground truth.
    """
    return ClassAccuracy(
        class_names=list(category_names(ground_truth).values()),
        precision={
            threshold: precision_by_class(ground_truth, run.detections, iou_threshold=threshold)
            for threshold in IOU_THRESHOLDS
        },
        errors=evaluate_tide(ground_truth, run.detections) if is_installed() else None,
        confusion=confusion_matrix(ground_truth, run.detections),
    )
