"""Results over several seeds: means, paired differences and their intervals.

Two sources of chance are kept apart. The interval over seeds is Student's, of the differences between two rows of one
seed; it estimates what another training would give. The bootstrap draws the validation images with repetition, the same
ones for all rows and seeds, and averages over the seeds; it estimates what other images would give.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from experiments import runs
from klbox_jax.evaluation.bootstrap import MatchedClass, average_precision_by_iou, resample_counts
from klbox_jax.evaluation.confidence import CONFIDENCE, percentile_interval, student_interval
from klbox_jax.report import columns
from klbox_jax.report.columns import Column, interval_text
from klbox_jax.report.plots import IOU_THRESHOLDS, plot_ap_over_iou
from klbox_jax.report.tables import LABELS, METRICS

NUM_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Difference:
    """A metric of one row minus that of another, in points, seed by seed."""

    row: str  # row and base: names of the rows
    base: str
    metric: str  # of `METRICS`
    by_seed: tuple[float, ...]  # in the order of the seeds
    images: tuple[float, float]  # the interval over images, low and high

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.by_seed))

    @property
    def seeds(self) -> tuple[float, float] | None:
        """Student's interval of the mean over seeds, low and high; None for a single seed."""
        return student_interval(self.by_seed)

    def intervals(self) -> list[tuple[float, float]]:
        """Returns the intervals that exist."""
        return [bounds for bounds in (self.seeds, self.images) if bounds is not None]

    def to_dict(self) -> dict:
        """Returns everything as plain numbers."""
        return {
            **dataclasses.asdict(self),
            "mean": self.mean,
            "interval_seeds": self.seeds,
            "interval_images": self.images,
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows over several seeds."""

    means: list[dict]  # each row once; see `mean_rows`
    differences: list[Difference]  # see `paired_differences`


def compare(
    rows_by_seed: Sequence[Sequence[Mapping]],
    matched: Mapping[tuple[int, str], list[MatchedClass]],
    pairs: Sequence[tuple[str, str]],
) -> Comparison:
    """Returns means and differences of rows.

    Args:
        rows_by_seed: the same rows in the same order for each seed; with `METRICS`, `AP_by_iou`, `seed` and `seconds`.
        matched: detections by seed and name of the row, on one set of images.
        pairs: names of a row and of its base, for each difference.

    Raises:
        ValueError: the set of images is too small for a bootstrap.
    """
    differences = paired_differences(rows_by_seed, resampled_metrics(matched), pairs)
    return Comparison(means=mean_rows(rows_by_seed), differences=differences)


def mean_rows(rows_by_seed: Sequence[Sequence[Mapping]]) -> list[dict]:
    """Returns each row once: its labels, the means of its metrics over the seeds, and their standard deviations.

    `std` has the latter, None for one seed; `seeds` and `seconds` have an entry for each seed.
    """

    def std(numbers: list[float]) -> float | None:
        return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None

    result = []
    for same in zip(*rows_by_seed, strict=True):
        values = {metric: [row[metric] for row in same] for metric in METRICS}
        further = {
            "std": {metric: std(numbers) for metric, numbers in values.items()},
            "AP_by_iou": np.mean([row["AP_by_iou"] for row in same], axis=0).tolist(),
            "seeds": [row["seed"] for row in same],
            "seconds": [row["seconds"] for row in same],
        }
        means = {metric: float(np.mean(numbers)) for metric, numbers in values.items()}
        result.append({key: same[0][key] for key in LABELS} | means | further)
    return result


def resampled_metrics(
    matched: Mapping[tuple[int, str], list[MatchedClass]], *, seed: int = 0
) -> dict[tuple[int, str], Float[ndarray, "S metrics"]]:
    """Returns `METRICS` on `NUM_RESAMPLES` draws of the images, the same draws for every key of `matched`.

    Raises ValueError if a draw has no objects.
    """
    num_images = len(next(iter(matched.values()))[0].num_objects)
    counts = resample_counts(num_images=num_images, num_resamples=NUM_RESAMPLES, seed=seed)
    found = {}
    for key, classes in matched.items():
        curves = [average_precision_by_iou(classes, row) for row in counts]
        if any(curve is None for curve in curves):
            raise ValueError("a draw of the images has no objects; the set is too small for a bootstrap")
        found[key] = np.stack([metrics_of_curve(curve) for curve in curves])
    return found


def metrics_of_curve(curve: Float[ndarray, " 10"]) -> Float[ndarray, " metrics"]:
    """Returns `METRICS` from AP at each IoU threshold."""
    at = {f"AP{round(100 * iou)}": value for iou, value in zip(IOU_THRESHOLDS, curve, strict=True)}
    return np.array([curve.mean() if metric == "AP" else at[metric] for metric in METRICS])


def paired_differences(
    rows_by_seed: Sequence[Sequence[Mapping]],
    resampled: Mapping[tuple[int, str], Float[ndarray, "S metrics"]],
    pairs: Sequence[tuple[str, str]],
) -> list[Difference]:
    """Returns the differences of the pairs (row, base), one for each metric; `resampled` is by seed and row."""
    found = []
    by_name = [{row["name"]: row for row in rows} for rows in rows_by_seed]
    for row, base in pairs:
        seeds = [rows[row]["seed"] for rows in by_name]
        draws = np.mean([resampled[seed, row] - resampled[seed, base] for seed in seeds], axis=0)
        for i, metric in enumerate(METRICS):
            by_seed = tuple(rows[row][metric] - rows[base][metric] for rows in by_name)
            found.append(Difference(row, base, metric, by_seed, percentile_interval(draws[:, i])))
    return found


# Columns of a difference.
MEAN_AND_INTERVALS = (
    Column("mean", lambda one: f"{one.mean:+.2f}"),
    Column("over seeds", lambda one: interval_text(one.seeds), is_text=True),
    Column("over images", lambda one: interval_text(one.images), is_text=True),
)


def mean_and_std(metric: str) -> Column:
    """Returns a column with the mean of a metric and, over several seeds, its standard deviation."""

    def cell(row: Mapping) -> str:
        std = row["std"][metric]
        return f"{row[metric]:.1f}" if std is None else f"{row[metric]:.1f} ± {std:.1f}"

    return Column(metric, cell)


def markdown(compared: Comparison, *, meta: Mapping[str, object]) -> str:
    """Returns the table of means, that of the differences, and a note on their intervals."""

    def above(one: Difference) -> str:
        return "yes" if all(low > 0 for low, _ in one.intervals()) else "no"

    seeds = compared.means[0]["seeds"]
    difference_columns = (
        Column("difference", lambda one: f"{one.row} - {one.base}"),
        Column("metric", lambda one: one.metric, is_text=True),
        *(*MEAN_AND_INTERVALS, Column("both above 0", above, is_text=True)),
    )
    return columns.page(
        columns.listing(meta),
        f"Mean and standard deviation over seeds {', '.join(map(str, seeds))}, in per cent:",
        columns.table([*map(columns.text, LABELS), *map(mean_and_std, METRICS)], compared.means),
        f"Differences in points, paired by seed, with {100 * CONFIDENCE:.0f} % intervals:",
        columns.table(difference_columns, compared.differences),
        f"Over seeds: Student's interval of the mean of {len(seeds)} paired differences. Over images: percentiles of "
        f"{NUM_RESAMPLES} draws of the images with repetition, the same for both rows and all seeds.",
    )


def write(
    compared: Comparison, folder: pathlib.Path, text: str, *, meta: Mapping, title: str, name: str = "table"
) -> None:
    """Writes NAME.json with the rows, the differences and `meta`, NAME.md with the text, and ap_over_iou.png."""
    differences = [one.to_dict() for one in compared.differences]
    runs.write_result(folder, {"rows": compared.means, "differences": differences, **meta}, text, name=name)
    plot_ap_over_iou(compared.means, folder / "ap_over_iou.png", title=title)
