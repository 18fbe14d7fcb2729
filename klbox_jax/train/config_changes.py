"""Compares the config of a run with the one that it was started with."""

import json
from typing import Any

from klbox_jax.config.saved import ADDED_FIELDS, FREE_FIELDS

_ABSENT = object()


def find_changes(old: Any, new: Any, name: str = "") -> dict[str, str]:
    """Returns 'was X, now Y' for the dotted name of each leaf that differs; both values come from JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = {}
        for key in sorted(old.keys() | new.keys()):
            inner = f"{name}.{key}" if name else key
            changes |= find_changes(old.get(key, _ABSENT), new.get(key, _ABSENT), inner)
        return changes
    # True == 1 in Python, but not in a config.
    if old == new and isinstance(old, bool) == isinstance(new, bool):
        return {}
    return {name: f"was {_show(old)}, now {_show(new)}"}


def with_added_fields(old: Any, new: Any, prefix: str = "") -> Any:
    """Returns a config with those of `ADDED_FIELDS` that it lacks and that the new config has."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return old
    names = {key: f"{prefix}{key}" for key in new}
    added = {
        key: ADDED_FIELDS[name] for key, name in names.items() if name in ADDED_FIELDS and key not in old
    }
    return added | {
        key: with_added_fields(value, new.get(key), f"{prefix}{key}.") for key, value in old.items()
    }


def is_free(name: str, free_fields: tuple[str, ...] = FREE_FIELDS) -> bool:
    """Returns True if a dotted name is one of the free fields or below one of them."""
    return any(name == field or name.startswith(field + ".") for field in free_fields)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
