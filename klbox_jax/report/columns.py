"""Markdown tables and pages from records: a column computes the cell of each record."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from klbox_jax.report.tables import markdown_table

MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: unique in its table.
        cell: returns the cell of a record.
        is_text: aligned to the left, as the first column always is.
    """

    heading: str
    cell: Callable[[Any], str]
    is_text: bool = False


def text(key: str, heading: str = "") -> Column:
    """Returns a column of words: those at `key` of each record."""
    return Column(heading or key, lambda record: str(record[key]), is_text=True)


def number(key: str, form: str = ".1f", heading: str = "") -> Column:
    """Returns a column of formatted numbers.

    Args:
        key: of the number in a record; `a/b` is `b` in the record at `a`. A number that is missing or None gives "-".
        form: format specification.
        heading: the key, unless given.
    """

    def cell(record: Mapping) -> str:
        value: Any = record
        for part in key.split("/"):
            value = (value or {}).get(part)
        return format_number(value, form)

    return Column(heading or key, cell)


def numbers(form: str, keys: Mapping[str, str] | Sequence[str]) -> list[Column]:
    """Returns a column for each key, see `number`; as a mapping, `keys` has the headings."""
    headings = keys if isinstance(keys, Mapping) else {key: key for key in keys}
    return [number(key, form, heading) for key, heading in headings.items()]


def format_number(value: float | int | None, form: str) -> str:
    """Returns the formatted number, or "-" for None."""
    return MISSING if value is None else format(value, form)


def interval_text(bounds: Sequence[float] | None, form: str = "+.2f") -> str:
    """Returns "low to high", or "-" for None."""
    return MISSING if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def table(columns: Sequence[Column], records: Sequence[Any]) -> str:
    """Returns the Markdown table with one row for each record."""
    return markdown_table(
        [column.heading for column in columns],
        [[column.cell(record) for column in columns] for record in records],
        text_columns=[column.heading for column in columns if column.is_text],
    )


def listing(meta: Mapping[str, object]) -> str:
    """Returns a list with one line for each entry: `- key: value`."""
    return "\n".join(f"- {key}: {value}" for key, value in meta.items())


def page(*paragraphs: str) -> str:
    """Returns the paragraphs that are not empty, with a blank line between them and a line end after the last."""
    return "\n\n".join(filter(None, paragraphs)) + "\n"
