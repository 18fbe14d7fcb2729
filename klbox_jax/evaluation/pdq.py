"""Probability-based Detection Quality of boxes with Gaussian corners (Hall et al., WACV 2020).

PDQ = sum over assigned pairs of sqrt(spatial quality * label quality) / (TP + FP + FN). It has no IoU threshold:
objects and detections are assigned so that the sum is largest.

Pixel i spans [i, i + 1) and counts as covered if any part of it is, for objects and detections alike.
"""

import collections

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.special import ndtr

from klbox_jax.data.masks import parse_segmentation, to_compressed_rle
from klbox_jax.evaluation.matching import check_entries, corners, in_crowd, numbers

# Constants of the authors' code. Pixels of a lower probability are not detected.
MIN_PIXEL_PROBABILITY = 0.0027
_LOG_FLOOR = 1e-14  # added to probabilities before the logarithm
_MIN_QUALITY = 1e-8  # lower qualities are 0, so that the pair is no true positive
# An edge does not cover a pixel that it only enters by this much, which may be a rounding error.
_MARGIN = 1e-6
_STD_WITHOUT_STDS = 1e-9  # of edges without std; far below the margin


def evaluate_pdq(ground_truth: dict, results: list[dict], *, min_score: float = 0.0) -> dict:
    """Computes PDQ and its parts, in per cent.

    Spatial quality is exp(-(foreground loss + background loss)). With P the probability that a pixel is inside the
    detection, foreground loss is the mean of -log P over the object's pixels, and background loss is the sum of
    -log(1 - P) over detected pixels outside the object's box, divided by the number of the object's pixels. An object's
    pixels are its `segmentation` if the annotation has one, and its box otherwise. Label quality is the probability of
    the object's class: the score for the detected class, and an equal share of 1 - score for each other class. All
    this agrees with the authors' code, as does that corners outside the image have no probability mass.

    It differs from their code in three points: crowds are not objects, and unassigned detections inside them are not
    counted; the background starts at the annotated box, not at the tightest box around the mask; a box without stds has
    sharp edges and no partly covered pixels.

    Args:
        ground_truth: COCO dictionary; images have `height` and `width`.
        results: entries as made by `klbox_jax.evaluation.coco.to_coco_results`.
        min_score: detections with a lower score are left out. Each remaining one without an object lowers PDQ.

    Returns:
        `PDQ`; means over assigned pairs: `spatial_quality`, `foreground_quality`, `background_quality`, `label_quality`
        (None without pairs); counts: `true_positives`, `false_positives`, `false_negatives`. PDQ is None without
        objects and detections.

    Raises:
        ValueError: see `klbox_jax.evaluation.matching.check_entries`; or an image has no size, a score is
            outside 0 to 1, or a segmentation is malformed.
    """
    check_entries(ground_truth, results)
    _check_sizes_and_scores(ground_truth, results)
    annotations = ground_truth["annotations"]
    crowds = [entry for entry in annotations if entry.get("iscrowd", 0)]
    objects = _by_image([entry for entry in annotations if not entry.get("iscrowd", 0)])
    detections = _by_image([entry for entry in results if entry["score"] >= min_score])

    num_classes = len(ground_truth["categories"])
    pairs, unassigned, num_objects = [np.zeros((0, 5))], [], 0
    for image in ground_truth["images"]:
        annotated, found = objects[image["id"]], detections[image["id"]]
        qualities, is_assigned = _assign(annotated, found, image, num_classes)
        pairs.append(qualities)
        unassigned += [entry for entry, assigned in zip(found, is_assigned, strict=True) if not assigned]
        num_objects += len(annotated)
    pairs = np.concatenate(pairs)
    false_positives = len(unassigned) - int(in_crowd(unassigned, crowds, share=0.5).sum())
    total = num_objects + false_positives  # TP + FN are all objects
    means = [100 * float(mean) for mean in pairs.mean(axis=0)] if len(pairs) else [None] * 5
    return {
        "PDQ": 100 * float(pairs[:, 0].sum()) / total if total else None,
        "spatial_quality": means[1],
        "foreground_quality": means[2],
        "background_quality": means[3],
        "label_quality": means[4],
        "true_positives": len(pairs),
        "false_positives": false_positives,
        "false_negatives": num_objects - len(pairs),
    }


def _by_image(entries: list[dict]) -> collections.defaultdict:
    groups = collections.defaultdict(list)
    for entry in entries:
        groups[entry["image_id"]].append(entry)
    return groups


def _assign(
    annotations: list[dict], detections: list[dict], image: dict, num_classes: int
) -> tuple[Float[ndarray, "p 5"], Bool[ndarray, " d"]]:
    """Assigns detections to the objects of one image.

    Returns:
        Overall, spatial, foreground, background and label quality of each assigned pair; True for each assigned
        detection.
    """
    # Imported here: it takes a fifth of the import time of a training, which needs it only for the evaluation.
    from scipy.optimize import linear_sum_assignment

    spatial, foreground, background = spatial_qualities(
        annotations, detections, height=image["height"], width=image["width"]
    )
    label = _label_qualities(annotations, detections, num_classes)
    overall = np.sqrt(spatial * label)
    rows, columns = linear_sum_assignment(overall, maximize=True)
    is_pair = overall[rows, columns] > 0
    rows, columns = rows[is_pair], columns[is_pair]
    is_assigned = np.zeros(len(detections), bool)
    is_assigned[columns] = True
    tables = (overall, spatial, foreground, background, label)
    return np.stack([table[rows, columns] for table in tables], axis=1), is_assigned


def spatial_qualities(
    annotations: list[dict], detections: list[dict], *, height: int, width: int
) -> tuple[Float[ndarray, "g d"], Float[ndarray, "g d"], Float[ndarray, "g d"]]:
    """Returns spatial, foreground and background quality of every pair of an object and a detection of one image."""
    masks = np.zeros((len(annotations), height, width), bool)
    outside = np.ones((len(annotations), height, width), bool)
    for row, (entry, box) in enumerate(zip(annotations, corners(annotations, "bbox"), strict=True)):
        rectangle = _covered(box, height, width)
        outside[row][rectangle] = False
        masks[row] = _annotated_mask(entry, height, width) if "segmentation" in entry else ~outside[row]
    pixels = masks.sum(axis=(1, 2))
    foreground, background = np.zeros((2, len(annotations), len(detections)))
    stds = numbers(detections, "bbox_std") if detections and "bbox_std" in detections[0] else None
    for d, box in enumerate(corners(detections, "bbox")):
        window, probabilities = detected_pixels(
            box, np.zeros(4) if stds is None else stds[d], height=height, width=width
        )
        here = masks[:, *window]
        unseen = (pixels - here.sum(axis=(1, 2))) * np.log(_LOG_FLOOR)
        foreground[:, d] = np.tensordot(here, np.log(probabilities + _LOG_FLOOR)) + unseen
        background[:, d] = np.tensordot(outside[:, *window], np.log(1 - probabilities + _LOG_FLOOR))
    per_pixel = np.maximum(pixels, 1)[:, None]
    # The floor can make a logarithm positive by 1e-14. An object without pixels, outside the image, has quality 0.
    foreground, background = (
        np.where(pixels[:, None] > 0, np.exp(np.minimum(loss, 0.0) / per_pixel), 0.0)
        for loss in (foreground, background)
    )
    qualities = (foreground * background, foreground, background)
    return tuple(np.where(quality < _MIN_QUALITY, 0.0, quality) for quality in qualities)


def detected_pixels(
    box: Float[ndarray, "4"], stds: Float[ndarray, "4"], *, height: int, width: int
) -> tuple[tuple[slice, slice], Float[ndarray, "h w"]]:
    """Returns the window of rows and columns that a box may cover, and the probability of each pixel in it."""
    down, across = (
        _pixel_probabilities(box[[axis, axis + 2]], stds[[axis, axis + 2]], size)
        for axis, size in ((1, height), (0, width))
    )
    rows = np.flatnonzero(down * across.max() >= MIN_PIXEL_PROBABILITY)
    columns = np.flatnonzero(across * down.max() >= MIN_PIXEL_PROBABILITY)
    if not len(rows):
        return (slice(0, 0), slice(0, 0)), np.zeros((0, 0))
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    probabilities = down[window[0], None] * across[None, window[1]]
    return window, np.where(probabilities < MIN_PIXEL_PROBABILITY, 0.0, probabilities)


def _pixel_probabilities(
    edges: Float[ndarray, "2"], stds: Float[ndarray, "2"], size: int
) -> Float[ndarray, " {size}"]:
    """Returns the probability that each pixel of a line is between two Gaussian edges, both inside the line.

    Pixel i is covered by [a, b] if a < i + 1 and b > i.
    """
    (low, high), (low_std, high_std) = (
        np.where(stds > 0, edges, np.clip(edges, 0, size)),
        stds + _STD_WITHOUT_STDS,
    )
    starts = np.arange(size + 1) - _MARGIN
    is_left = ndtr((starts - low) / low_std)  # of the start of each pixel, and of the end of the line
    ends = np.arange(size + 1) + _MARGIN
    is_right = ndtr((high - ends) / high_std)
    return (is_left[1:] - is_left[0]) * (is_right[:-1] - is_right[-1])


def _covered(box: Float[ndarray, "4"], height: int, width: int) -> tuple[slice, slice]:
    """Returns the rows and columns of the pixels that a box covers at least partly."""
    x1, y1 = np.floor(box[:2] + _MARGIN).astype(int)
    x2, y2 = np.ceil(box[2:] - _MARGIN).astype(int)
    (y1, y2), (x1, x2) = np.clip([y1, y2], 0, height), np.clip([x1, x2], 0, width)
    return slice(y1, y2), slice(x1, x2)


def _annotated_mask(annotation: dict, height: int, width: int) -> Bool[ndarray, "{height} {width}"]:
    """Returns the mask of an annotation with a segmentation."""
    try:
        compressed = to_compressed_rle(annotation["segmentation"], height=height, width=width)
        runs = parse_segmentation(compressed, height=height, width=width)
    except ValueError as error:
        raise ValueError(f"annotation {annotation.get('id')}: invalid 'segmentation': {error}") from None
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _label_qualities(
    annotations: list[dict], detections: list[dict], num_classes: int
) -> Float[ndarray, "g d"]:
    classes = np.array([entry["category_id"] for entry in annotations])
    found = np.array([entry["category_id"] for entry in detections])
    scores = np.array([entry["score"] for entry in detections], np.float64)
    others = (1 - scores) / max(num_classes - 1, 1)
    return np.where(classes[:, None] == found[None, :], scores[None, :], others[None, :])


def _check_sizes_and_scores(ground_truth: dict, results: list[dict]) -> None:
    for i, image in enumerate(ground_truth["images"]):
        if not all(isinstance(image.get(side), int) and image[side] > 0 for side in ("height", "width")):
            raise ValueError(f"images[{i}]: height and width must be positive integers")
    for i, entry in enumerate(results):
        if not 0 <= entry["score"] <= 1:
            raise ValueError(f"results[{i}]: score {entry['score']} is not a probability")
