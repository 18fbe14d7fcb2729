"""Goals for one H200, and whether a run meets them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.accelerator.outcomes import MEASURED
from benchmarks.accelerator.plan import HARD, PEER, Cell, headline
from benchmarks.accelerator.sizes import Sizes

Outcomes = Mapping[str, Mapping[str, Any]]
TRAIN_RATE, INFERENCE_RATE, SPEED_UP, VOTING_SHARE, PRODUCT_SHARE = 100.0, 250.0, 1.5, 0.02, 0.5


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that is wanted.

    Attributes:
        text: name, with the bound.
        value: of this run, None where it was not measured.
        met: None where it was not measured.
    """

    text: str
    value: float | None
    met: bool | None


def check_goals(outcomes: Outcomes, sizes: Sizes) -> list[Goal]:
    """Returns the goals with the values of a run.

    Args:
        outcomes: of the cells, by name.
        sizes: of the run.
    """
    train, inference = headline(sizes, "train"), headline(sizes, "inference")
    training = _number(outcomes, train, "images_per_second")
    theirs = _number(outcomes, headline(sizes, "train", PEER), "images_per_second")
    detecting = _number(outcomes, inference, "images_per_second")
    full = _number(outcomes, inference, "seconds")
    hard = _number(outcomes, headline(sizes, "inference", variant=HARD), "seconds")
    return [
        _at_least(f"training, {_setting(train)}: at least {TRAIN_RATE:g} images/s", training, TRAIN_RATE),
        _at_least(
            f"training, {_setting(train)}: at least {SPEED_UP:g} times torchvision's autocast",
            None if None in (training, theirs) else training / theirs,
            SPEED_UP,
        ),
        _at_least(
            f"inference, {_setting(inference)}: at least {INFERENCE_RATE:g} images/s",
            detecting,
            INFERENCE_RATE,
        ),
        _at_most(
            f"voting and soft-NMS: at most {VOTING_SHARE:.0%} of the eval step, over hard NMS",
            None if None in (full, hard) else 1 - hard / full,
            VOTING_SHARE,
        ),
        _at_least(
            f"training, {_setting(train)}: at least {PRODUCT_SHARE:.0%} of the rate of a large product",
            product_share(outcomes, train),
            PRODUCT_SHARE,
        ),
    ]


def product_share(outcomes: Outcomes, cell: Cell) -> float | None:
    """Returns the useful operations of a step each second, over those of a large product in its precision."""
    rate = _number(outcomes, Cell(kind="product", precision=cell.precision), "flops_per_second")
    flops, seconds = (_number(outcomes, cell, name) for name in ("flops", "seconds"))
    return None if None in (rate, flops, seconds) else flops / seconds / rate


def _setting(cell: Cell) -> str:
    return f"{cell.precision} at batch {cell.batch}"


def _number(outcomes: Outcomes, cell: Cell, name: str) -> float | None:
    outcome = outcomes.get(cell.name, {})
    return outcome.get(name) if outcome.get("status") == MEASURED else None


def _at_least(text: str, value: float | None, bound: float) -> Goal:
    return Goal(text, value, None if value is None else value >= bound)


def _at_most(text: str, value: float | None, bound: float) -> Goal:
    return Goal(text, value, None if value is None else value <= bound)
