"""What several seeds of the same rows say together: means, paired differences and their intervals.

Two sources of chance are kept apart. The interval over seeds is Student's, of the differences between two rows of one
seed: would another training show it? The bootstrap draws the validation images anew, the same ones for all rows and
seeds, and averages over the seeds: would other images show it?
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from klbox_jax.evaluation.bootstrap import MatchedClass, average_precision_by_iou, resample_counts
from klbox_jax.report.plots import IOU_THRESHOLDS
from klbox_jax.report.tables import METRICS, markdown_table

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Difference:
    """A metric of one row minus that of another, in points, seed by seed.

    Attributes:
        row, base: names of the rows.
        metric: of `METRICS`.
        by_seed: in the order of the seeds.
        images: the interval over images, low and high.
    """

    row: str
    base: str
    metric: str
    by_seed: tuple[float, ...]
    images: tuple[float, float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.by_seed))

    @property
    def seeds(self) -> tuple[float, float] | None:
        """Student's interval of the mean over seeds, low and high; None for a single seed."""
        return student_interval(self.by_seed)

    def to_dict(self) -> dict:
        """Returns everything as plain numbers."""
        return {
            **dataclasses.asdict(self),
            "mean": self.mean,
            "interval_seeds": self.seeds,
            "interval_images": self.images,
        }


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the interval of a mean at `CONFIDENCE`, for independent normal values; None for fewer than two."""
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def mean_rows(rows_by_seed: Sequence[Sequence[Mapping]]) -> list[dict]:
    """Returns each row once, with the mean and standard deviation of its metrics over the seeds.

    Args:
        rows_by_seed: the same rows in the same order for each seed; with `METRICS` and `AP_by_iou`.

    Returns:
        `name`, `loss`, `suppression`, `voting`; each metric and `AP_by_iou` as means; `std`, the metrics' standard
        deviations (None for one seed); `seeds` and `seconds`, one for each seed.
    """
    result = []
    for same in zip(*rows_by_seed, strict=True):
        values = {metric: [row[metric] for row in same] for metric in METRICS}
        result.append(
            {key: same[0][key] for key in ("name", "loss", "suppression", "voting")}
            | {metric: float(np.mean(numbers)) for metric, numbers in values.items()}
            | {
                "std": {
                    metric: float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
                    for metric, numbers in values.items()
                },
                "AP_by_iou": np.mean([row["AP_by_iou"] for row in same], axis=0).tolist(),
                "seeds": [row["seed"] for row in same],
                "seconds": [row["seconds"] for row in same],
            }
        )
    return result


def resampled_metrics(
    matched: Mapping[tuple[int, str], list[MatchedClass]], *, seed: int = 0
) -> dict[tuple[int, str], Float[ndarray, "S metrics"]]:
    """Returns `METRICS` on `NUM_RESAMPLES` draws of the images, the same draws for every seed and row.

    Args:
        matched: by seed and name of the row, on one set of images.
        seed: of the draws.

    Raises:
        ValueError: a draw has no objects.
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
    at = {
        f"AP{round(100 * threshold)}": value for threshold, value in zip(IOU_THRESHOLDS, curve, strict=True)
    }
    return np.array([curve.mean() if metric == "AP" else at[metric] for metric in METRICS])


def differences(
    rows_by_seed: Sequence[Sequence[Mapping]],
    resampled: Mapping[tuple[int, str], Float[ndarray, "S metrics"]],
    pairs: Sequence[tuple[str, str]],
) -> list[Difference]:
    """Returns the differences of the named pairs (row, base), one for each metric.

    Args:
        rows_by_seed: as in `mean_rows`, each row with its `seed`.
        resampled: from `resampled_metrics`.
        pairs: names of rows.
    """
    found = []
    by_name = [{row["name"]: row for row in rows} for rows in rows_by_seed]
    tails = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
    for row, base in pairs:
        draws = np.mean(
            [resampled[rows[row]["seed"], row] - resampled[rows[base]["seed"], base] for rows in by_name],
            axis=0,
        )
        for i, metric in enumerate(METRICS):
            low, high = np.percentile(draws[:, i], tails)
            found.append(
                Difference(
                    row=row,
                    base=base,
                    metric=metric,
                    by_seed=tuple(rows[row][metric] - rows[base][metric] for rows in by_name),
                    images=(float(low), float(high)),
                )
            )
    return found


def interval_text(bounds: tuple[float, float] | None) -> str:
    """Returns an interval as the tables print it."""
    return "-" if bounds is None else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"


def markdown(rows: Sequence[Mapping], found: Sequence[Difference], *, meta: Mapping[str, object]) -> str:
    """Returns the table of means and that of the differences, and what their intervals mean."""

    def cell(row: Mapping, metric: str) -> str:
        std = row["std"][metric]
        return f"{row[metric]:.1f}" if std is None else f"{row[metric]:.1f} ± {std:.1f}"

    def above(one: Difference) -> str:
        bounds = [one.images] if one.seeds is None else [one.images, one.seeds]
        return "yes" if all(low > 0 for low, _ in bounds) else "no"

    seeds = rows[0]["seeds"]
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        f"Mean and standard deviation over seeds {', '.join(map(str, seeds))}, in per cent:",
        markdown_table(
            ("name", "loss", "suppression", "voting", *METRICS),
            [
                [row[key] for key in ("name", "loss", "suppression", "voting")]
                + [cell(row, metric) for metric in METRICS]
                for row in rows
            ],
            text_columns=("loss", "suppression", "voting"),
        ),
        f"Differences in points, paired by seed, with {100 * CONFIDENCE:.0f} % intervals:",
        markdown_table(
            ("difference", "metric", "mean", "over seeds", "over images", "both above 0"),
            [
                [
                    f"{one.row} - {one.base}",
                    one.metric,
                    f"{one.mean:+.2f}",
                    interval_text(one.seeds),
                    interval_text(one.images),
                    above(one),
                ]
                for one in found
            ],
            text_columns=("metric", "over seeds", "over images", "both above 0"),
        ),
        f"Over seeds: Student's interval of the mean of {len(seeds)} paired differences. Over images: percentiles of "
        f"{NUM_RESAMPLES} draws of the images with repetition, the same for both rows and all seeds.",
    ]
    return "\n\n".join(parts) + "\n"
