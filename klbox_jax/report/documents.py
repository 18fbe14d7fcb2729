"""Tables inside of documents: each is generated, and written between two comments that name it.

A table is between `<!-- table: NAME -->` and `<!-- /table -->`; the rest of the document is written by hand.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from klbox_jax.files import write_atomically

MARKED = re.compile(r"<!-- table: (?P<name>[^>]*?) -->\n.*?<!-- /table -->", re.DOTALL)
Tables = Mapping[str, Callable[[], str]]


def fill(document: str, tables: Tables) -> str:
    """Returns a document with its tables replaced by those generated now.

    Args:
        document: Markdown.
        tables: by name, a function that returns the table.

    Raises:
        ValueError: the document names a table that is not in `tables`.
    """

    def replacement(found: re.Match) -> str:
        name = found["name"]
        if name not in tables:
            raise ValueError(f"no table is named {name!r}; the names are {sorted(tables)}")
        return f"<!-- table: {name} -->\n{tables[name]()}\n<!-- /table -->"

    return MARKED.sub(replacement, document)


def update(
    documents: Sequence[pathlib.Path], tables: Tables, *, check: bool, command: str
) -> list[pathlib.Path]:
    """Writes each document whose tables are out of date, and returns those documents.

    Args:
        documents: Markdown files.
        tables: see `fill`.
        check: write nothing.
        command: regenerates the tables; for the error.

    Raises:
        ValueError: `check` is set and a document is out of date.
    """
    changed = []
    for document in documents:
        old = document.read_text(encoding="utf-8")
        new = fill(old, tables)
        if new == old:
            continue
        if check:
            raise ValueError(f"{document} has other tables than docs/results gives; run {command}")
        write_atomically(document, new)
        changed.append(document)
    return changed
