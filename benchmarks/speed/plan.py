"""Which measures a run has, and how long it takes at most."""

from collections.abc import Sequence

from benchmarks.speed.measure import Measure


def choose(measures: Sequence[Measure], only: Sequence[str], *, has_torch: bool) -> tuple[Measure, ...]:
    """Returns the measures whose names begin with one of `only`, or all of them.

    Raises:
        ValueError: a name is unknown, or a chosen measure needs torchvision, which is not installed.
    """
    for start in only:
        if not any(measure.name.startswith(start) for measure in measures):
            raise ValueError(
                f"--only={start} is unknown; choose from {', '.join(measure.name for measure in measures)}"
            )
    chosen = tuple(
        measure for measure in measures if not only or any(measure.name.startswith(name) for name in only)
    )
    refused = [measure.name for measure in chosen if measure.needs_torch and not has_torch]
    if refused:
        raise ValueError(
            f"{', '.join(refused)} cannot run without torch and torchvision: `make speed` installs them; or name "
            "other measures with --only"
        )
    return chosen


def plan_text(measures: Sequence[Measure]) -> str:
    """Returns a line for each measure, and the sum of what they may take once they are compiled."""
    lines = [
        f"{measure.name}: up to {measure.pairs} pairs in {measure.seconds:.0f} s, against {measure.against}"
        for measure in measures
    ]
    total = sum(measure.seconds for measure in measures)
    return "\n".join(
        [*lines, f"{len(measures)} measures, at most {total / 60:.0f} minutes and their preparations"]
    )
