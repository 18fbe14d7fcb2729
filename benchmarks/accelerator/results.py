"""Files of a run."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accelerator.goals import Goal, check_goals
from benchmarks.accelerator.outcomes import MEASURED, skipped
from benchmarks.accelerator.page import page_markdown
from benchmarks.accelerator.plan import Cell
from benchmarks.accelerator.processes import Collected
from benchmarks.accelerator.sizes import Sizes
from klbox_jax.files import write_atomically, write_json


def write_results(
    output: pathlib.Path,
    cells: Sequence[Cell],
    collected: Collected,
    *,
    facts: Mapping[str, Any],
    notes: Sequence[str],
    sizes: Sizes,
) -> list[Goal]:
    """Writes accelerator.json and accelerator.md; returns the goals.

    Args:
        output: folder.
        cells: all of the run; those without an outcome yet count as not measured.
        collected: what the processes have measured so far.
        facts: about the host and the run.
        notes: sentences for the page.
        sizes: of the run.
    """
    outcomes = {cell.name: collected.outcomes.get(cell.name, skipped("not reached yet")) for cell in cells}
    for environment in collected.environments.values():
        facts = {**facts, **{key: value for key, value in environment.items() if key != "versions"}}
    versions = {
        name: version
        for environment in collected.environments.values()
        for name, version in environment.get("versions", {}).items()
    }
    facts = {**facts, "versions": versions}
    goals = check_goals(outcomes, sizes)
    result = {
        "facts": facts,
        "sizes": dataclasses.asdict(sizes),
        "cells": [dataclasses.asdict(cell) | {"name": cell.name, **outcomes[cell.name]} for cell in cells],
        "goals": [dataclasses.asdict(goal) for goal in goals],
    }
    write_json(output / "accelerator.json", result)
    page = page_markdown(cells=cells, outcomes=outcomes, goals=goals, facts=facts, notes=notes)
    write_atomically(output / "accelerator.md", page)
    return goals


def failed_checks(cells: Sequence[Cell], outcomes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each correctness check that fails or was not made."""
    sentences = []
    for cell in cells:
        if cell.kind != "correctness":
            continue
        outcome = outcomes[cell.name]
        if outcome["status"] != MEASURED:
            sentences.append(f"{cell.variant} was not checked: {outcome['reason']}")
        for precision, found in outcome.items():
            if isinstance(found, Mapping):
                sentences += [f"{cell.variant} in {precision}: {failure}" for failure in found["failures"]]
    return sentences
