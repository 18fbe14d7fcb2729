"""Outcome of a cell, as the JSON file has it."""

from typing import Any

MEASURED, OUT_OF_MEMORY, FAILED, SKIPPED = "measured", "out of memory", "failed", "not measured"


def measured(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the outcome of a cell that was measured."""
    return {"status": MEASURED, **result}


def skipped(reason: str) -> dict[str, Any]:
    """Returns the outcome of a cell that was not tried, or not finished."""
    return {"status": SKIPPED, "reason": reason}


def failure(error: Exception) -> dict[str, Any]:
    """Returns the outcome of a cell that raised an error; memory that does not suffice is an outcome of its own."""
    text = f"{type(error).__name__}: {error}"
    is_out_of_memory = "RESOURCE_EXHAUSTED" in text or "OutOfMemoryError" in text
    return {
        "status": OUT_OF_MEMORY if is_out_of_memory else FAILED,
        "reason": text.strip().splitlines()[0][:300],
    }
