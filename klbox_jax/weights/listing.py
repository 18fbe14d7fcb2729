"""How messages about weights list names."""

import difflib
from collections.abc import Sequence

# At most so many names of a kind are listed in a message.
MAX_LISTED = 12


def listed(items: Sequence[str]) -> str:
    """Returns the first items, and how many more there are."""
    more = f", and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns ', nearest NAME' with the most similar of the names, or nothing where none is similar."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f", nearest {found[0]}" if found else ""
