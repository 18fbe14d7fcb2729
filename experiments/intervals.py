"""Edge intervals and calibrated scores of a trained detector, over random halves of its images: docs/intervals.md.

    klbox eval runs/kl --split=test --name=test
    python -m experiments.intervals --workdir=runs/kl --evaluation=test --split=test --name=scenes

It reads `eval/STEP/test/detections.json`, which the first command writes, and runs no network. For each of 40 seeds,
everything is fitted to the detections in one half of the images and measured on the other half. With `--name` the
result is docs/results/intervals_NAME.json, whose tables `python -m experiments.results` writes into docs/intervals.md;
otherwise it is WORKDIR/intervals.json. `--picture=FILE.jpg` draws outer and inner boxes on a few images, if the run was
calibrated before the evaluation.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray
from PIL import Image

from experiments import stored_results
from experiments.interval_picture import draw
from experiments.interval_tables import MAIN, MEASURES, SETS
from klbox_jax import cli
from klbox_jax.data.build import build_source
from klbox_jax.data.source import Source
from klbox_jax.evaluation.conformal import fit_intervals, split_images
from klbox_jax.evaluation.detected_edges import WIDTHS, MatchedEdges, matched_edges
from klbox_jax.evaluation.edge_calibration import FILE_KEY
from klbox_jax.evaluation.interval_scores import SIZES, coco_sizes, summarize_intervals
from klbox_jax.evaluation.matching import IGNORED, TRUE_POSITIVE, match_detections
from klbox_jax.evaluation.score_calibration import METHODS, fit_scores
from klbox_jax.evaluation.score_calibration_error import ANY_OVERLAP, d_ece, laace_0, laece_0
from klbox_jax.files import read_json, write_atomically
from klbox_jax.serving.model_folder import read_config
from klbox_jax.train.workdir import Workdir

NUM_SPLITS = 40
COVERAGES = (0.5, 0.8, 0.9, 0.95)
IOU_THRESHOLD = 0.5
# Scores are measured over all detections, and over those that a user would be shown.
MIN_SCORES = (0.0, 0.3)


@dataclasses.dataclass(frozen=True)
class ScoredDetections:
    """Detections with what their scores are calibrated to, one row each; those only a crowd accounts for are left out.

    Attributes:
        scores, classes, image_ids: as in the results.
        ious: with the match of any overlap, 0 for a false positive.
        ious_at_half: with the match of IoU 0.5 or more.
    """

    scores: Float[ndarray, " n"]
    classes: Shaped[ndarray, " n"]
    image_ids: Shaped[ndarray, " n"]
    ious: Float[ndarray, " n"]
    ious_at_half: Float[ndarray, " n"]

    def rows(self, keep: Bool[ndarray, " n"]) -> "ScoredDetections":
        """Returns some of the rows."""
        return ScoredDetections(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


def scored_detections(ground_truth: dict, results: list[dict]) -> ScoredDetections:
    """Matches all detections with the objects, at any overlap and at IoU 0.5."""
    loose, strict = (
        match_detections(ground_truth, results, iou_threshold=threshold, background_iou=0.0)
        for threshold in (ANY_OVERLAP, IOU_THRESHOLD)
    )
    keep = (loose.kind != IGNORED) & (strict.kind != IGNORED)  # both are in the order of the scores
    ious = [np.where(found.kind == TRUE_POSITIVE, found.iou, 0.0)[keep] for found in (loose, strict)]
    image_ids = np.array([results[i]["image_id"] for i in loose.result_index.tolist()])[keep]
    return ScoredDetections(loose.scores[keep], loose.category_ids[keep], image_ids, *ious)


def measure_intervals(edges: MatchedEdges, is_fitted: Bool[ndarray, " n"]) -> dict[tuple[str, float], dict]:
    """Fits intervals of each scale and coverage to some rows, and measures them on the others.

    Returns:
        By scale and coverage, the numbers of `summarize_intervals`, and `inside`, True for each measured box with all
        four edges inside. The scale `by class` is sigma at level `class`.
    """
    fitted, measured = edges.rows(is_fitted), edges.rows(~is_fitted)
    found = {}
    for kind in (*WIDTHS, "by class"):
        scale = "scaled" if kind == "by class" else kind
        if scale == "scaled" and edges.detected.stds is None:
            continue
        model = fitted.width_model() if scale == "width_model" else None
        own, other = fitted.own_scales(scale), measured.detected.scales(scale, model)
        for coverage in COVERAGES:
            intervals = fit_intervals(
                fitted.errors,
                own,
                fitted.image_ids,
                coverage=coverage,
                level="class" if kind == "by class" else "box",
                classes=fitted.detected.classes,
            )
            half = intervals.half_widths(other, measured.detected.classes)
            row = summarize_intervals(measured.errors, half, half, measured.image_ids, coverage=coverage)
            row["inside"] = (np.abs(measured.errors) <= half).all(axis=1)
            found[kind, coverage] = row
    return found


def measure_scores(
    detections: ScoredDetections, is_fitted: Bool[ndarray, " n"]
) -> dict[str, dict[str, float]]:
    """Fits each method to some rows, and measures it on the others; `none` is without calibration."""
    fitted, measured = detections.rows(is_fitted), detections.rows(~is_fitted)
    found = {}
    for method in ("none", *METHODS):
        scores = measured.scores
        if method != "none":
            curves = fit_scores(fitted.scores, fitted.ious, fitted.classes, method=method)
            scores = curves.calibrate(measured.scores, measured.classes)
        found[method] = {
            "LaECE_0": laece_0(scores, measured.ious, measured.classes),
            "D_ECE": d_ece(scores, measured.ious_at_half),
            "LaACE_0": laace_0(scores, measured.ious, measured.classes),
        }
    return found


def compare(ground_truth: dict, results: list[dict], *, num_splits: int = NUM_SPLITS) -> dict[str, Any]:
    """Measures intervals and scores over random halves of the images.

    Returns:
        `intervals`: records of scale and coverage with means over the splits, and the standard deviation of the
        coverage. `groups`: coverage at 90 % of each size and class, pooled over the splits. `scores`: records of method
        and least score. `gain`: mean share by which the interval score of sigma is below that of the better of
        `additive` and `multiplicative`. Also `num_boxes`, `num_images`, `num_splits`, `num_detections`.
    """
    edges = matched_edges(ground_truth, results, iou_threshold=IOU_THRESHOLD, min_score=0.0)
    detections = scored_detections(ground_truth, results)
    images = np.array([image["id"] for image in ground_truth["images"]])
    by_split, score_rows = [], collections.defaultdict(list)
    tally = _Tally(edges, {entry["id"]: entry["name"] for entry in ground_truth["categories"]})
    for seed in range(num_splits):
        first = images[split_images(images, 0.5, seed)]
        is_fitted = np.isin(edges.image_ids, first)
        by_split.append(measure_intervals(edges, is_fitted))
        tally.add(by_split[-1], ~is_fitted)
        for min_score in MIN_SCORES:
            shown = detections.rows(detections.scores >= min_score)
            for method, row in measure_scores(shown, np.isin(shown.image_ids, first)).items():
                score_rows[method, min_score].append(row)
        logging.info("split %d of %d", seed + 1, num_splits)
    return {
        "intervals": [_mean_record(by_split, *key) for key in by_split[0]],
        "groups": tally.records(),
        "gain": _gain(by_split),
        "scores": [
            {"method": method, "min_score": min_score}
            | {name: float(np.mean([row[name] for row in rows])) for name in MEASURES}
            for (method, min_score), rows in score_rows.items()
        ],
        "num_boxes": len(edges.errors),
        "num_images": len(images),
        "num_splits": num_splits,
        "num_detections": {f"{low:g}": int((detections.scores >= low).sum()) for low in MIN_SCORES},
    }


class _Tally:
    """Counts the covered boxes of each size and class at the main coverage."""

    def __init__(self, edges: MatchedEdges, names: Mapping):
        classes = np.array([names[category] for category in edges.detected.classes.tolist()])
        sizes = coco_sizes(edges.detected.boxes + edges.errors)
        self._groups = {size: sizes == size for size in SIZES}
        self._groups |= {name: classes == name for name in names.values()}
        self._num, self._covered = collections.Counter(), collections.Counter()

    def add(self, found: Mapping[tuple[str, float], dict], is_measured: Bool[ndarray, " n"]) -> None:
        for group, members in self._groups.items():
            own = members[is_measured]
            self._num[group] += int(own.sum())
            for (kind, coverage), row in found.items():
                if coverage == MAIN:
                    self._covered[group, kind] += int(row["inside"][own].sum())

    def records(self) -> list[dict]:
        """Returns for each group its number of boxes and its coverage by scale."""
        kinds = list(dict.fromkeys(kind for _, kind in self._covered))
        return [
            {"group": group, "num": int(members.sum())}
            | {kind: self._covered[group, kind] / self._num[group] for kind in kinds}
            for group, members in self._groups.items()
            if self._num[group]
        ]


def _mean_record(by_split: Sequence[Mapping], kind: str, coverage: float) -> dict[str, Any]:
    rows = [found[kind, coverage] for found in by_split]
    record: dict[str, Any] = {"scale": kind, "asked": coverage}
    record["coverage_std"] = float(np.std([row["coverage"] for row in rows]))
    for name in ("coverage", "coverage_image_mean", "mean_width", "interval_score"):
        values = [row[name] for row in rows]
        record[name] = None if None in values else float(np.mean(values))
    return record


def _gain(by_split: Sequence[Mapping]) -> float | None:
    shares = []
    for found in by_split:
        rows = [found.get((kind, MAIN)) for kind in ("scaled", "additive", "multiplicative")]
        scores = [None if row is None else row["interval_score"] for row in rows]
        if None in scores:
            return None
        shares.append(1 - scores[0] / min(scores[1:]))
    return float(np.mean(shares))


def read_detections(
    workdir: Workdir, split: str, *, evaluation: str = "", step: int | None = None
) -> tuple[Source, list[dict], dict]:
    """Returns the images of a split, the detections of an evaluation of it, and its metrics.

    Args:
        workdir: the folder of the run.
        split: of the run's data set.
        evaluation: name of the evaluation, or "".
        step: of the evaluation; by default the last.

    Raises:
        ValueError: there is no evaluation, or it is of other images.
    """
    command = f"klbox eval {workdir.path} --split={split} --name={split}"
    files = list(
        workdir.path.glob(f"eval/*/{evaluation}/metrics.json" if evaluation else "eval/*/metrics.json")
    )
    steps = [int(path.relative_to(workdir.path).parts[1]) for path in files]
    if not steps or step not in (None, *steps):
        raise ValueError(
            f"{workdir.path} has no evaluation {evaluation!r} of this step; run {command} and give --evaluation={split}"
        )
    folder = workdir.eval_dir(max(steps) if step is None else step) / evaluation
    metrics = read_json(folder / "metrics.json")
    source = build_source(read_config(workdir).data, split)
    if metrics["data"] != source.name:
        raise ValueError(
            f"{folder} is an evaluation of {metrics['data']}, not of {source.name}; run {command} and give "
            f"--evaluation={split}"
        )
    return source, read_json(folder / "detections.json"), metrics


def main(_: list[str]) -> None:
    """Measures a run and writes the result."""
    workdir = Workdir(_WORKDIR.value)
    source, results, metrics = read_detections(
        workdir, _SPLIT.value, evaluation=_EVALUATION.value, step=_STEP.value
    )
    found = compare(source.coco_ground_truth(), results, num_splits=_SPLITS.value)
    found |= {key: metrics[key] for key in ("step", "seed", "data", "data_fingerprint", "postprocess", "AP")}
    output = workdir.path / "intervals.json"
    if _NAME.value:
        output = stored_results.RESULTS / f"intervals_{_NAME.value}.json"
    write_atomically(output, stored_results.to_text(found))
    if _PICTURE.value:
        if not results or FILE_KEY not in results[0]:
            raise ValueError(f"the evaluation has no {FILE_KEY}; run klbox calibrate, and klbox eval again")
        Image.fromarray(draw(source, results)).save(_PICTURE.value, optimize=True, quality=75)
    logging.info("%s; sigma gains %s", output, found["gain"])


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run with an evaluation of the split.")
    _SPLIT = flags.DEFINE_string("split", "test", "Split of the evaluation.")
    _EVALUATION = flags.DEFINE_string("evaluation", "", "Name of the evaluation; by default the one without.")
    _STEP = flags.DEFINE_integer("step", None, "Step of the evaluation; by default the last.")
    _SPLITS = flags.DEFINE_integer("splits", NUM_SPLITS, "Random halves of the images.", lower_bound=1)
    _NAME = flags.DEFINE_enum("name", None, list(SETS), "Store the result in docs/results under this name.")
    _PICTURE = flags.DEFINE_string("picture", "", "File of a picture with outer and inner boxes.")
    flags.mark_flags_as_required(["workdir"])
    cli.start(main)
