"""How far average precision would move on other images of the same kind: the bootstrap over images.

COCO's precision is a function of how often each image is counted. Here the matching of detections with objects is
done once, and precision is then computed for any counts; counts of 1 give back COCO's own number.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from klbox_jax.evaluation.coco import coco_evaluator


@dataclasses.dataclass(frozen=True)
class MatchedClass:
    """Detections of one class, best first, held against its objects; `T` IoU thresholds, `I` images.

    Attributes:
        image_index: which image each detection is in.
        is_true_positive, is_false_positive: at each IoU threshold; an ignored detection is neither.
        num_objects: of each image.
    """

    image_index: Int[ndarray, " n"]
    is_true_positive: Bool[ndarray, "T n"]
    is_false_positive: Bool[ndarray, "T n"]
    num_objects: Int[ndarray, " I"]


def match_classes(ground_truth: dict, results: list[dict]) -> list[MatchedClass]:
    """Matches all detections with objects as pycocotools does, objects of all sizes, 100 detections a class and image.

    Args:
        ground_truth: COCO dictionary.
        results: as `klbox_jax.evaluation.coco.to_coco_results` makes them.

    Returns:
        One entry for each category, in the order of their ids. Images are in the order of their ids.
    """
    evaluator = coco_evaluator(ground_truth, results)
    num_images, num_areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    classes = []
    for k in range(len(evaluator.params.catIds)):
        start = k * num_areas * num_images  # the first area range is all sizes
        images = evaluator.evalImgs[start : start + num_images]
        classes.append(_join(images, num_thresholds=len(evaluator.params.iouThrs)))
    return classes


def _join(images: list[dict | None], *, num_thresholds: int) -> MatchedClass:
    shown = [(i, image) for i, image in enumerate(images) if image is not None]
    num_objects = np.zeros(len(images), int)
    for i, image in shown:
        num_objects[i] = np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)

    def joined(rows: list) -> ndarray:
        return np.concatenate([np.zeros((num_thresholds, 0), bool), *rows], axis=1)

    scores = np.concatenate([np.zeros(0), *(image["dtScores"] for _, image in shown)])
    order = np.argsort(-scores, kind="stable")
    index = [np.full(len(image["dtScores"]), i) for i, image in shown]
    is_matched = joined([image["dtMatches"] > 0 for _, image in shown])[:, order]
    is_ignored = joined([image["dtIgnore"] > 0 for _, image in shown])[:, order]
    return MatchedClass(
        image_index=np.concatenate([np.zeros(0, int), *index])[order],
        is_true_positive=is_matched & ~is_ignored,
        is_false_positive=~is_matched & ~is_ignored,
        num_objects=num_objects,
    )


def average_precision_by_iou(
    classes: list[MatchedClass], counts: Int[ndarray, " I"]
) -> Float[ndarray, " T"] | None:
    """COCO's average precision at each IoU threshold, in per cent, where image `i` is counted `counts[i]` times.

    The mean over the classes that have objects in the counted images; None where no class has any. Equals
    pycocotools on a data set in which each image stands that many times, but for the order of equal scores within an
    image.
    """
    rows = [_precision_of_class(matched, counts) for matched in classes if matched.num_objects @ counts > 0]
    return 100.0 * np.mean(rows, axis=0) if rows else None


def _precision_of_class(matched: MatchedClass, counts: Int[ndarray, " I"]) -> Float[ndarray, " T"]:
    weights = counts[matched.image_index]
    true = np.cumsum(matched.is_true_positive * weights, axis=1)
    false = np.cumsum(matched.is_false_positive * weights, axis=1)
    recall = true / (matched.num_objects @ counts)
    precision = true / (true + false + np.spacing(1))
    # Precision at a recall is the best at that recall or any above it.
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    envelope = np.concatenate(
        [envelope, np.zeros((len(envelope), 1))], axis=1
    )  # recalls that are never reached
    levels = np.linspace(0.0, 1.0, 101)
    reached = np.stack([np.searchsorted(row, levels, side="left") for row in recall])
    return np.take_along_axis(envelope, reached, axis=1).mean(axis=1)


def resample_counts(*, num_images: int, num_resamples: int, seed: int) -> Int[ndarray, "S I"]:
    """Returns how often each image is drawn in each of `S` draws of as many images as there are, with repetition."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_images, np.full(num_images, 1.0 / num_images), size=num_resamples)
