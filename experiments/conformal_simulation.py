"""Simulated coverage of conformal intervals, for each level and multiplicity: docs/intervals.md.

    python -m experiments.conformal_simulation --workdir=runs/conformal_simulation
    python -m experiments.conformal_simulation --workdir=runs/quick --draws=200 --sizes=20,100

Errors have a Student distribution of 3 degrees of freedom, edges of a box correlate, boxes of an image share a
difficulty that sigma does not know, and the number of boxes of an image varies. Each draw fits intervals to n boxes and
counts how many of other boxes they cover. For the levels `box` and `class` each box comes from an image of its own, so
that boxes are exchangeable; the row `box, whole images` shows what happens where they are not. It takes some minutes.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags, logging
from jaxtyping import Float, Int
from numpy import ndarray

from klbox_jax import cli
from klbox_jax.evaluation.conformal import fit_intervals
from klbox_jax.files import write_atomically, write_json
from klbox_jax.report.tables import markdown_table

COVERAGE = 0.9
SIZES = (20, 100, 500, 2000)
MAX_BOXES = 7
# Boxes (or whole images) that each draw is tested on. Many, so that the spread of a row is that of its fits.
NUM_TEST = 400
# A difference from the promise counts from so many standard errors on.
NUM_ERRORS = 3.0
NUM_CLASSES = 2
# The harder class, for which level `class` is measured.
MEASURED_CLASS = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str  # first cell of the row
    level: str = "box"  # level and multiplicity and asymmetric and missed_share: arguments of `fit_intervals`
    multiplicity: str = "max"
    asymmetric: bool = False
    missed_share: float = 0.0
    whole_images: bool = False  # True for boxes that come in images; otherwise each is of an image of its own
    # `exact`: from the coverage that was asked to 1 / (n + 1) more, for n units. `risk`: to 2 / (n + 1) more. `at
    # least`: no upper bound. `none`: nothing.
    promise: str = "exact"


SETTINGS = (
    Setting("box, max"),
    Setting("box, max, asymmetric", asymmetric=True, promise="at least"),
    Setting("box, bonferroni", multiplicity="bonferroni", promise="at least"),
    Setting("box, sidak", multiplicity="sidak", promise="at least"),
    Setting("box, max_rank", multiplicity="max_rank", promise="at least"),
    Setting("edge by itself", multiplicity="edge"),
    Setting("class, max", level="class"),
    Setting("image, all boxes", level="image", whole_images=True),
    Setting("image, all but 20 %", level="image", missed_share=0.2, whole_images=True),
    Setting("image_mean", level="image_mean", whole_images=True, promise="risk"),
    Setting("box, whole images", whole_images=True, promise="none"),
)
SPREAD_SETTINGS = ("box, max", "box, whole images", "image_mean", "image, all boxes")
WHOLE_IMAGES = {setting.name for setting in SETTINGS if setting.whole_images}


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Simulated boxes: errors and sigmas in pixels, and the image and class of each."""

    errors: Float[ndarray, "n 4"]
    sigmas: Float[ndarray, "n 4"]
    image_ids: Int[ndarray, " n"]
    classes: Int[ndarray, " n"]


def draw_boxes(rng: np.random.Generator, num_images: int, *, whole_images: bool) -> Boxes:
    """Draws images of 1 to `MAX_BOXES` boxes, or of one each."""
    counts = rng.integers(1, MAX_BOXES + 1, num_images) if whole_images else np.ones(num_images, int)
    image_ids = np.repeat(np.arange(num_images), counts)
    num = len(image_ids)
    difficulty = np.exp(rng.normal(0, 0.5, num_images))[image_ids, None]
    classes = rng.integers(0, NUM_CLASSES, num)
    sigmas = np.exp(rng.normal(1, 0.6, (num, 1)) + rng.normal(0, 0.3, (num, 4)))
    # One class is twice as hard as its sigma says, and each edge has half of its variance in common with the others.
    noise = (rng.normal(size=(num, 1)) + rng.normal(size=(num, 4))) / math.sqrt(2)
    student = noise / np.sqrt(rng.chisquare(3, (num, 1)) / 3)
    return Boxes(student * sigmas * difficulty * (1 + classes[:, None]), sigmas, image_ids, classes)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Intervals fitted once and tried on other boxes."""

    coverage: float  # of the units that the level promises something for; 1 where the intervals are infinite
    images_below: float  # share of images with less than 80 % of their boxes covered
    num_units: int  # number of units that the quantile was fitted to
    is_infinite: bool  # True if the intervals are


def simulate(setting: Setting, num: int, seed: Sequence[int]) -> Draw | None:
    """Fits intervals to `num` boxes, or to images of so many on average, and tries them on others.

    Returns:
        None where the class that is measured has too few labels for a quantile of its own: level `class` promises
        nothing then.
    """
    rng = np.random.default_rng(seed)
    # A number of images that does not depend on how many boxes they have keeps the images exchangeable.
    num_images = math.ceil(2 * num / (1 + MAX_BOXES)) if setting.whole_images else num
    calibration = draw_boxes(rng, num_images, whole_images=setting.whole_images)
    test = draw_boxes(rng, NUM_TEST, whole_images=setting.whole_images)
    fitted = fit_intervals(
        calibration.errors,
        calibration.sigmas,
        calibration.image_ids,
        coverage=COVERAGE,
        multiplicity=setting.multiplicity,
        level=setting.level,
        classes=calibration.classes,
        missed_share=setting.missed_share,
        asymmetric=setting.asymmetric,
    )
    if MEASURED_CLASS in fitted.pooled_classes:
        return None
    widths = fitted.half_widths(test.sigmas, test.classes)
    lower, upper = widths if setting.asymmetric else (widths, widths)
    inside = (test.errors >= -lower) & (test.errors <= upper)
    covered = inside.mean(axis=1) if setting.multiplicity == "edge" else inside.all(axis=1).astype(float)
    shares = np.bincount(test.image_ids, covered) / np.bincount(test.image_ids)
    own = {
        "box": covered,
        "class": covered[test.classes == MEASURED_CLASS],
        "image": shares >= 1 - setting.missed_share - 1e-9,
        "image_mean": shares,
    }[setting.level]
    units = {"box": num, "class": int((calibration.classes == MEASURED_CLASS).sum())}
    return Draw(
        coverage=float(own.mean()),
        images_below=float((shares < 0.8).mean()),
        num_units=units.get(setting.level, num_images),
        is_infinite=not np.isfinite(lower).all(),
    )


def measure(setting: Setting, num: int, num_draws: int) -> dict:
    """Returns the row of a setting and a number of boxes: mean coverage, its standard error, and what was promised."""
    draws = [simulate(setting, num, (num, draw)) for draw in range(num_draws)]
    kept = [draw for draw in draws if draw is not None]
    if not kept:
        return {"setting": setting.name, "num": num, "num_draws": 0, "keeps_promise": None}
    coverages = np.array([draw.coverage for draw in kept])
    error = float(coverages.std() / math.sqrt(len(kept)))
    one_more = float(np.mean([1 / (draw.num_units + 1) for draw in kept]))
    low = {"none": None}.get(setting.promise, COVERAGE)
    high = {"exact": COVERAGE + one_more, "risk": COVERAGE + 2 * one_more}.get(setting.promise)
    mean = float(coverages.mean())
    is_low = low is not None and mean < low - NUM_ERRORS * error
    is_high = high is not None and mean > high + NUM_ERRORS * error
    return {
        "setting": setting.name,
        "num": num,
        "num_draws": len(kept),
        "coverage": mean,
        "standard_error": error,
        "spread": float(coverages.std()),
        "low": low,
        "high": None if high is None else min(high, 1.0),
        "keeps_promise": None if setting.promise == "none" else not (is_low or is_high),
        "images_below": float(np.mean([draw.images_below for draw in kept])),
        "infinite": float(np.mean([draw.is_infinite for draw in kept])),
    }


def table(rows: Sequence[dict]) -> str:
    """Returns the table of all rows: a cell is the coverage in per cent, with the share of infinite intervals."""

    def cell(row: dict) -> str:
        if not row["num_draws"]:
            return "-"
        mark = {True: "", False: " (!)", None: ""}[row["keeps_promise"]]
        infinite = f", {100 * row['infinite']:.0f} % infinite" if row["infinite"] else ""
        return f"{100 * row['coverage']:.2f} ± {100 * row['standard_error']:.2f}{infinite}{mark}"

    sizes = sorted({row["num"] for row in rows})
    by_place = {(row["setting"], row["num"]): row for row in rows}
    promises = {setting.name: setting.promise for setting in SETTINGS}
    names = list(dict.fromkeys(row["setting"] for row in rows))
    return markdown_table(
        ("level, multiplicity", "promise", *(f"n = {num}" for num in sizes)),
        [[name, promises[name], *(cell(by_place[name, num]) for num in sizes)] for name in names],
        text_columns=("promise",),
    )


def spread_table(rows: Sequence[dict]) -> str:
    """Returns the table of what a single calibration set may give: spread of the coverage, and images covered badly."""
    return markdown_table(
        ("level, multiplicity", "n", "coverage", "spread", "images under 80 %"),
        [
            [
                row["setting"],
                str(row["num"]),
                f"{100 * row['coverage']:.1f}",
                f"{100 * row['spread']:.1f}",
                f"{100 * row['images_below']:.1f}" if row["setting"] in WHOLE_IMAGES else "-",
            ]
            for row in rows
            if row["setting"] in SPREAD_SETTINGS and row["infinite"] < 1
        ],
    )


def write_results(workdir: pathlib.Path, sizes: Sequence[int], num_draws: int) -> list[dict]:
    """Measures all settings at all sizes, and writes `table.json` and `table.md`."""
    rows = []
    for setting in SETTINGS:
        for num in sizes:
            rows.append(measure(setting, num, num_draws))
            logging.info("%s", rows[-1])
    meta = {"asked": COVERAGE, "num_draws": num_draws, "num_test": NUM_TEST}
    write_json(workdir / "table.json", {"rows": rows, **meta})
    write_atomically(workdir / "table.md", markdown(rows, num_draws))
    return rows


def markdown(rows: Sequence[dict], num_draws: int) -> str:
    """Returns both tables with their captions."""
    parts = [
        f"Coverage in per cent, {100 * COVERAGE:g} asked: mean of {num_draws} draws, ± one standard error. A row that "
        f"misses its promise by more than {NUM_ERRORS:g} standard errors is marked (!).",
        table(rows),
        "Standard deviation of the coverage over draws (calibration and test set are both drawn), and share "
        "of images with less than 80 % of their boxes covered, in per cent:",
        spread_table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(_: list[str]) -> None:
    """Simulates, writes the tables, and prints the one in Markdown."""
    workdir = pathlib.Path(_WORKDIR.value)
    write_results(workdir, [int(size) for size in _SIZES.value], _DRAWS.value)
    print((workdir / "table.md").read_text())


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "runs/conformal_simulation", "Folder of the tables.")
    _DRAWS = flags.DEFINE_integer("draws", 2000, "Calibration sets of each row and size.", lower_bound=2)
    _SIZES = flags.DEFINE_list("sizes", [str(size) for size in SIZES], "Numbers of calibration boxes.")
    cli.start(main)
