"""Measures of how well scores are calibrated; each states its bins, its IoU and its mean.

No two libraries agree on D-ECE: bins over 0 to 1 or from the smallest to the largest score, 10 or 25 of them, matches
at IoU 0.5 or at any overlap. All bins here have equal width over 0 to 1, open below and closed above, and the first has
0 too. Lower is better. A measure over no detections is None. Fewer detections are not better calibration, so look at
the counts, and compare at one score threshold.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from klbox_jax.evaluation.array_checks import class_ids, shares
from klbox_jax.evaluation.matching import IGNORED, TRUE_POSITIVE, check_entries, corners, match_detections

# IoU at which any overlap is a match: tau = 0 of LaECE_0.
ANY_OVERLAP = 1e-9
LAECE_BINS = 25
DECE_BINS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Points of a reliability diagram.

    Attributes:
        counts: detections in each of the B bins.
        mean_scores, mean_targets: NaN in an empty bin.
        edges: of the bins, from 0 to 1.
    """

    counts: Int[ndarray, " B"]
    mean_scores: Float[ndarray, " B"]
    mean_targets: Float[ndarray, " B"]
    edges: Float[ndarray, " B+1"]

    def error(self) -> float | None:
        """Returns sum over bins of n_b / n |mean score - mean target|, or None without detections."""
        total = int(self.counts.sum())
        if not total:
            return None
        used = self.counts > 0
        gaps = np.abs(self.mean_scores[used] - self.mean_targets[used])
        return float((self.counts[used] * gaps).sum() / total)

    def to_dict(self) -> dict[str, list]:
        """Returns plain numbers for JSON; the means of an empty bin are None."""
        fields = {name: getattr(self, name).tolist() for name in ("edges", "counts")}
        for name in ("mean_scores", "mean_targets"):
            fields[name] = [None if math.isnan(value) else value for value in getattr(self, name).tolist()]
        return fields


def reliability_bins(scores: ArrayLike, targets: ArrayLike, *, num_bins: int = LAECE_BINS) -> ReliabilityBins:
    """Returns the points of a reliability diagram.

    Args:
        scores: [n], from 0 to 1.
        targets: [n], from 0 to 1: IoUs with 0 for false positives, or 1 for a true positive and 0 otherwise.
        num_bins: of equal width over 0 to 1.
    """
    scores = shares("scores", scores)
    targets = shares("targets", targets, len(scores))
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    index = np.searchsorted(edges[1:-1], scores)
    counts = np.bincount(index, minlength=num_bins)
    means = [
        np.divide(np.bincount(index, rows, num_bins), counts, out=np.full(num_bins, np.nan), where=counts > 0)
        for rows in (scores, targets)
    ]
    return ReliabilityBins(counts, *means, edges)


def d_ece(
    scores: ArrayLike, ious: ArrayLike, *, iou_threshold: float = 0.5, num_bins: int = DECE_BINS
) -> float | None:
    """Detection expected calibration error: sum of n_b / n |mean score - precision|, all classes together.

    Küppers et al. (2020) with confidence alone. A detection with an IoU of `iou_threshold` or more is a true positive.

    Args:
        scores: [n], from 0 to 1.
        ious: [n], of a matching at the same threshold; 0 for a false positive.
        iou_threshold: above 0.
        num_bins: 10 as in hotcoco. detection_calibration takes 25, and uq-detr bins from the smallest score to the
            largest.
    """
    scores = shares("scores", scores)
    is_hit = shares("ious", ious, len(scores)) >= iou_threshold
    return reliability_bins(scores, is_hit.astype(np.float64), num_bins=num_bins).error()


def laece_0(
    scores: ArrayLike, ious: ArrayLike, classes: ArrayLike, *, num_bins: int = LAECE_BINS
) -> float | None:
    """LaECE_0 (Kuzucu et al., ECCV 2024): sum of n_b / n |mean score - sum of IoUs / n_b|, mean over classes.

    Args:
        scores: [n], from 0 to 1.
        ious: [n], of a matching at any overlap (tau = 0, see `matched_scores`); 0 for a false positive.
        classes: [n]; classes without detections are left out.
        num_bins: 25 in the paper.
    """
    return _mean_over_classes(
        lambda rows: reliability_bins(*rows, num_bins=num_bins).error(), scores, ious, classes
    )


def laace_0(scores: ArrayLike, ious: ArrayLike, classes: ArrayLike) -> float | None:
    """LaACE_0 (Kuzucu et al., ECCV 2024): mean |score - IoU|, mean over classes; arguments as for `laece_0`.

    Every detection is a bin of its own, so the spread of the IoU counts: it is not 0 for calibrated scores.
    """
    return _mean_over_classes(lambda rows: float(np.abs(rows[0] - rows[1]).mean()), scores, ious, classes)


def object_calibration_error(
    ground_truth: dict, results: list[dict], *, iou_thresholds: tuple[float, ...] = (0.5, 0.75)
) -> float | None:
    """OCE (Park et al., TPAMI 2026): Brier score of each object, mean over objects and IoU thresholds.

    The class scores of all detections, of whatever class, that reach the IoU with an object are averaged. A detection
    gives its score to its class and 0 to the others, so a missed object has a Brier score of 1, and a wrong class with
    score 1 has 2, the largest value. uq-detr's form for single scores differs: 2 (1 - p)^2 for the right class.
    False positives do not count, and the value depends on the score threshold: duplicates of low score raise it.

    Args:
        ground_truth: COCO dictionary; crowds are no objects.
        results: detections with scores from 0 to 1.
        iou_thresholds: 0.5 and 0.75 in the paper.

    Returns:
        None without objects.

    Raises:
        ValueError: see `klbox_jax.evaluation.matching.check_entries`, or a score is not from 0 to 1.
    """
    check_entries(ground_truth, results)
    shares("scores", [entry["score"] for entry in results])
    found: dict[int, list[dict]] = {}
    for entry in results:
        found.setdefault(entry["image_id"], []).append(entry)
    wanted: dict[int, list[dict]] = {}
    for entry in ground_truth["annotations"]:
        if not entry.get("iscrowd", 0):
            wanted.setdefault(entry["image_id"], []).append(entry)
    scores = []
    for image, objects in wanted.items():
        detections = found.get(image, [])
        ious = _pairwise_iou(corners(objects, "bbox"), corners(detections, "bbox"))
        for own, entry in zip(ious, objects, strict=True):
            scores += [_brier_score(entry, detections, own >= threshold) for threshold in iou_thresholds]
    return float(np.mean(scores)) if scores else None


def matched_scores(
    ground_truth: dict, results: list[dict], *, iou_threshold: float = ANY_OVERLAP, min_score: float = 0.0
) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"], Shaped[ndarray, " n"]]:
    """Matches detections, and returns score, IoU and class of each; the IoU of a false positive is 0.

    Best scores choose first, within image and class, as for average precision; by default any overlap is a match. What
    only a crowd accounts for is left out.

    Raises:
        ValueError: see `klbox_jax.evaluation.matching.match_detections`.
    """
    matches = match_detections(
        ground_truth, results, iou_threshold=iou_threshold, background_iou=0.0, min_score=min_score
    )
    counted = matches.kind != IGNORED
    ious = np.where(matches.kind == TRUE_POSITIVE, matches.iou, 0.0)
    return matches.scores[counted], ious[counted], matches.category_ids[counted]


def evaluate_scores(ground_truth: dict, results: list[dict], *, min_score: float = 0.0) -> dict[str, Any]:
    """All measures of a results list, for detections with a score of `min_score` or more.

    Returns:
        `num_detections`, `num_matched` (at any overlap), `D_ECE` (10 bins, IoU 0.5), `LaECE_0`, `LaACE_0`, `OCE` (IoU
        0.5 and 0.75), `min_score`, and `reliability`, the bins of all classes against the IoU at any overlap.
    """
    scores, ious, classes = matched_scores(ground_truth, results, min_score=min_score)
    scores_at_half, ious_at_half, _ = matched_scores(
        ground_truth, results, iou_threshold=0.5, min_score=min_score
    )
    shown = [entry for entry in results if entry["score"] >= min_score]
    return {
        "num_detections": len(scores),
        "num_matched": int(np.count_nonzero(ious)),
        "D_ECE": d_ece(scores_at_half, ious_at_half),
        "LaECE_0": laece_0(scores, ious, classes),
        "LaACE_0": laace_0(scores, ious, classes),
        "OCE": object_calibration_error(ground_truth, shown),
        "min_score": min_score,
        "reliability": reliability_bins(scores, ious).to_dict(),
    }


def _mean_over_classes(measure, scores: ArrayLike, ious: ArrayLike, classes: ArrayLike) -> float | None:
    scores = shares("scores", scores)
    ious = shares("ious", ious, len(scores))
    classes = class_ids("classes", classes, len(scores))
    found = [measure((scores[classes == name], ious[classes == name])) for name in np.unique(classes)]
    return float(np.mean(found)) if found else None


def _brier_score(entry: dict, detections: list[dict], reaches: Bool[ndarray, " D"]) -> float:
    """Sum over classes of (1 if it is the object's - mean score)^2."""
    near = [detection for detection, near in zip(detections, reaches.tolist(), strict=True) if near]
    means = {entry["category_id"]: 0.0}
    for detection in near:
        name = detection["category_id"]
        means[name] = means.get(name, 0.0) + detection["score"] / len(near)
    return sum(((name == entry["category_id"]) - mean) ** 2 for name, mean in means.items())


def _pairwise_iou(a: Float[ndarray, "n 4"], b: Float[ndarray, "m 4"]) -> Float[ndarray, "n m"]:
    """IoU in float64, as COCO's evaluator has it; two empty boxes have 0."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.prod(np.maximum(sides, 0.0), axis=2)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
