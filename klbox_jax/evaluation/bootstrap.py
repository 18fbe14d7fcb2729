"""Bootstrap over images for COCO average precision.

Estimates how much average precision would vary on other images of the same kind. Detections are matched with objects
once; average precision is then computed for any number of copies of each image. One copy of each gives COCO's own
number.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from klbox_jax.evaluation.coco import coco_evaluator


@dataclasses.dataclass(frozen=True)
class MatchedClass:
    """Matched detections of one class, best scores first; `T` IoU thresholds, `I` images.

    Attributes:
        image_index: index of each detection's image.
        is_true_positive, is_false_positive: at each IoU threshold; an ignored detection is neither.
        num_objects: number of objects in each image, without ignored ones.
    """

    image_index: Int[ndarray, " n"]
    is_true_positive: Bool[ndarray, "T n"]
    is_false_positive: Bool[ndarray, "T n"]
    num_objects: Int[ndarray, " I"]


def match_classes(ground_truth: dict, results: list[dict]) -> list[MatchedClass]:
    """Matches all detections with objects as pycocotools does, for all sizes and 100 detections per class and image.

    Args:
        ground_truth: COCO dictionary.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`.

    Returns:
        One entry for each category, in the order of their ids. Images are in the order of their ids.
    """
    evaluator = coco_evaluator(ground_truth, results)
    num_images, num_areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    classes = []
    for k in range(len(evaluator.params.catIds)):
        start = k * num_areas * num_images  # the first area range is all sizes
        images = evaluator.evalImgs[start : start + num_images]
        classes.append(_concatenate_images(images, num_thresholds=len(evaluator.params.iouThrs)))
    return classes


def _concatenate_images(images: list[dict | None], *, num_thresholds: int) -> MatchedClass:
    """Concatenates the per-image matches of one class; an image without objects and detections is None."""
    present = [(i, image) for i, image in enumerate(images) if image is not None]
    num_objects = np.zeros(len(images), int)
    for i, image in present:
        num_objects[i] = np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)

    def concatenate(rows: list) -> ndarray:
        return np.concatenate([np.zeros((num_thresholds, 0), bool), *rows], axis=1)

    scores = np.concatenate([np.zeros(0), *(image["dtScores"] for _, image in present)])
    order = np.argsort(-scores, kind="stable")
    index = [np.full(len(image["dtScores"]), i) for i, image in present]
    is_matched = concatenate([image["dtMatches"] > 0 for _, image in present])[:, order]
    is_ignored = concatenate([image["dtIgnore"] > 0 for _, image in present])[:, order]
    return MatchedClass(
        image_index=np.concatenate([np.zeros(0, int), *index])[order],
        is_true_positive=is_matched & ~is_ignored,
        is_false_positive=~is_matched & ~is_ignored,
        num_objects=num_objects,
    )


def average_precision_by_iou(
    classes: list[MatchedClass], counts: Int[ndarray, " I"]
) -> Float[ndarray, " T"] | None:
    """Computes COCO's average precision at each IoU threshold, in per cent, with `counts[i]` copies of image `i`.

    Equals pycocotools on a data set that contains each image that many times, except for the order of equal scores
    within an image.

    Returns:
        Mean over the classes that have objects in the counted images; None if no class has any.
    """
    rows = [_precision_of_class(matched, counts) for matched in classes if matched.num_objects @ counts > 0]
    return 100.0 * np.mean(rows, axis=0) if rows else None


def _precision_of_class(matched: MatchedClass, counts: Int[ndarray, " I"]) -> Float[ndarray, " T"]:
    weights = counts[matched.image_index]
    true = np.cumsum(matched.is_true_positive * weights, axis=1)
    false = np.cumsum(matched.is_false_positive * weights, axis=1)
    recall = true / (matched.num_objects @ counts)
    precision = true / (true + false + np.spacing(1))
    # COCO's interpolation: precision at a recall is the highest precision at that recall or above.
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # Recall levels that are never reached have precision 0.
    envelope = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)
    levels = np.linspace(0.0, 1.0, 101)
    reached = np.stack([np.searchsorted(row, levels, side="left") for row in recall])
    return np.take_along_axis(envelope, reached, axis=1).mean(axis=1)


def resample_counts(*, num_images: int, num_resamples: int, seed: int) -> Int[ndarray, "S I"]:
    """Draws `S` bootstrap samples of `num_images` images with replacement; returns the count of each image."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_images, np.full(num_images, 1.0 / num_images), size=num_resamples)
