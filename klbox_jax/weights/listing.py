"""Lists of names, and similar names, for messages about weights."""

import difflib
from collections.abc import Sequence

# Number of names of a kind that a message lists.
MAX_LISTED = 12


def listed(items: Sequence[str]) -> str:
    """Returns the first items as text, with the number of further ones."""
    more = f", and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns ', nearest NAME' with the most similar of the names, or "" if none is similar."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f", nearest {found[0]}" if found else ""
