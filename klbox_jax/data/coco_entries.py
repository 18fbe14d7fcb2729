"""Reader of the JSON of a COCO annotation file, with a check of each entry on its own."""

import dataclasses
import functools
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from klbox_jax.data.image import pixel_limit
from klbox_jax.data.source import DataError, Fault, FaultHandler, shown

# COCO's largest file has half a gigabyte. Python's objects take about ten times as much.
MAX_FILE_BYTES = 2**33
# JPEG's own limit, and more than any canvas holds.
MAX_SIDE = 2**16 - 1

# The index of an entry in its list, and its fault.
EntryFaults = Sequence[tuple[int, Fault]]
# The index of an entry in its section of the file, and the entry; the index does not change if entries are left out.
_Rows = list[tuple[int, Any]]

# Characters that reorder the text around them on a terminal or a page: embeddings, overrides and isolates.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def is_id(value: Any) -> bool:
    """Returns True for an integer that float64 holds exactly, because the evaluator keeps ids in float64."""
    return type(value) is int and abs(value) < 2**53


def is_class_name(value: Any) -> bool:
    """Returns True for a text without line breaks, control characters and half characters.

    Joiners and no-break spaces, which `str.isprintable` refuses, belong to many languages and are accepted.
    """
    return (
        isinstance(value, str)
        and bool(value.strip())
        and not any(c in _BIDI_CONTROLS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value)
    )


def _is_finite(value: Any) -> bool:
    # Python's JSON reader accepts NaN, Infinity and integers beyond any float.
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


_ID = (is_id, "an integer of at most 53 bits")
_FILE_NAME = (lambda value: isinstance(value, str) and bool(value), "a text")
_SIZE = (
    lambda value: type(value) is int and 0 < value <= MAX_SIDE,
    f"a positive integer up to {MAX_SIDE}",
)
_BOX = (
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value)),
    "four finite numbers (x, y, width, height)",
)
# The required fields of an entry. `area` and `iscrowd` are optional, because many exporters leave them out.
_FIELDS = {
    "images": {"id": _ID, "file_name": _FILE_NAME, "height": _SIZE, "width": _SIZE},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": _BOX},
    "categories": {"id": _ID, "name": (is_class_name, "a printable text")},
}
_OPTIONAL_FIELDS = {
    "area": (lambda value: _is_finite(value) and value >= 0, "a finite number"),
    "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
}
_CORRECT = "Correct or remove the entry."


def read_json(path: str) -> dict:
    """Returns the object in a JSON file; raises DataError."""
    fault = functools.partial(Fault, kind="unreadable annotations", file=path, severity="fatal")
    check_path = "Check the data set's path and the split."
    try:
        size = os.path.getsize(path)
        # `isfile` also refuses a pipe, which would block the reader forever.
        if not os.path.isfile(path):
            raise DataError(fault(what="is not a file", remedy=check_path))
        if size > MAX_FILE_BYTES:
            too_large = f"has {size} bytes, where the limit is {MAX_FILE_BYTES}"
            raise DataError(fault(what=too_large, remedy="Split the data set into several."))
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except DataError:
        raise
    except OSError as error:
        raise DataError(fault(what=f"cannot be read ({error.strerror})", remedy=check_path)) from error
    except MemoryError as error:
        too_large = "needs more memory than this machine has"
        raise DataError(fault(what=too_large, remedy="Split the data set into several.")) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            fault(what=f"is not valid JSON: {reason}", remedy="Restore or export it again.")
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            fault(
                what="does not hold a JSON object",
                remedy="Check that it is a COCO instances file, or export it again.",
            )
        )
    return content


def valid_entries(path: str, content: dict, section: str, on_fault: FaultHandler) -> list[dict]:
    """Returns the entries of a section that have all their fields with valid values, and unique ids.

    Two categories may have one id or one name if annotations use at most one of the two, as Roboflow's root category
    does; an unused one of them is left out.

    Args:
        path: path of the file, for messages.
        content: the JSON of the file.
        section: "images", "annotations" or "categories".
        on_fault: receives the faults of one check after the other. The faults of categories are fatal, because
            fewer classes would be another task.

    Raises:
        DataError: the section is missing or empty, or (from `on_fault`) an entry has a fault.
    """
    rows: _Rows = list(enumerate(_section(path, content, section)))
    fault = functools.partial(Fault, file=path, severity="fatal" if section == "categories" else "error")
    checks = [_not_objects, _missing_fields, _wrong_values]
    if section != "categories":
        checks.append(_duplicate_ids)
    if section == "images":
        checks.append(_absurd_sizes)
    for check in checks:
        rows = _without_faulty(rows, check(section, rows, fault), on_fault)
    if section == "categories":
        used = _used_categories(content)
        rows = _without_faulty(rows, _duplicate_categories(rows, used, fault), on_fault)
    return [entry for _, entry in rows]


def _section(path: str, content: dict, section: str) -> list:
    entries = content.get(section)
    if isinstance(entries, list) and (entries or section == "annotations"):
        return entries
    is_list = isinstance(entries, list)
    raise DataError(
        Fault(
            kind="unreadable annotations",
            file=path,
            what=f"has an empty list '{section}'" if is_list else f"has no list '{section}'",
            remedy="Check that it is a COCO instances file, or export it again with all sections.",
            severity="fatal",
        )
    )


def _without_faulty(rows: _Rows, faults: EntryFaults, on_fault: FaultHandler) -> _Rows:
    """Reports faults, and returns the rows that have none."""
    on_fault([fault for _, fault in faults])
    faulty = {index for index, _ in faults}
    return [row for row in rows if row[0] not in faulty] if faults else rows


def _not_objects(section: str, rows: _Rows, fault: functools.partial) -> EntryFaults:
    return [
        (i, fault(kind="no object", record=f"{section}[{i}]", what="is not an object", remedy=_CORRECT))
        for i, entry in rows
        if not isinstance(entry, dict)
    ]


def _missing_fields(section: str, rows: _Rows, fault: functools.partial) -> EntryFaults:
    add = "Add the field, or remove the entry."
    return [
        (i, fault(kind="missing field", record=_label(section, i, entry), what=f"has no '{key}'", remedy=add))
        for i, entry in rows
        for key in _FIELDS[section]
        if key not in entry
    ]


def _wrong_values(section: str, rows: _Rows, fault: functools.partial) -> EntryFaults:
    fields = _FIELDS[section] | (_OPTIONAL_FIELDS if section == "annotations" else {})
    return [
        (
            i,
            fault(
                kind=f"wrong '{key}'",
                record=f"'{key}' of {_label(section, i, entry)}",
                what=f"is {shown(entry[key])}, not {expected}",
                remedy=_CORRECT,
            ),
        )
        for i, entry in rows
        for key, (accepts, expected) in fields.items()
        if key in entry and not accepts(entry[key])
    ]


def _duplicate_ids(section: str, rows: _Rows, fault: functools.partial) -> EntryFaults:
    first_with: dict[int, int] = {}
    return [
        (i, _same_id(section, first_with[entry["id"]], i, entry["id"], fault))
        for i, entry in rows
        if first_with.setdefault(entry["id"], i) != i
    ]


def _same_id(section: str, first: int, second: int, number: int, fault: functools.partial) -> Fault:
    return fault(
        kind="duplicate id",
        record=f"{section}[{first}] and {section}[{second}]",
        what=f"have the same id {number}",
        remedy="Give each entry an id of its own.",
    )


def _absurd_sizes(section: str, rows: _Rows, fault: functools.partial) -> EntryFaults:
    limit = pixel_limit()
    return [
        (
            i,
            fault(
                kind="absurdly large image",
                record=f"image {entry['id']}",
                what=f"has {entry['height']} x {entry['width']} pixels, where the limit is {limit}",
                remedy="Downscale it, or correct or remove the entry.",
            ),
        )
        for i, entry in rows
        if entry["height"] * entry["width"] > limit
    ]


def _used_categories(content: dict) -> Counter[int]:
    """Returns how many annotations have each category id."""
    annotations = content.get("annotations")
    entries = annotations if isinstance(annotations, list) else ()
    ids = (entry.get("category_id") for entry in entries if isinstance(entry, dict))
    return Counter(number for number in ids if type(number) is int)


def _duplicate_categories(rows: _Rows, used: Counter[int], fault: functools.partial) -> EntryFaults:
    faults: list[tuple[int, Fault]] = []
    first_with_id: dict[int, tuple[int, str]] = {}
    distinct: _Rows = []
    for i, entry in rows:
        first, name = first_with_id.setdefault(entry["id"], (i, entry["name"]))
        if first == i:
            distinct.append((i, entry))
        elif entry["name"] == name or not used[entry["id"]]:
            faults.append((i, _left_out(_same_id("categories", first, i, entry["id"], fault))))
        else:
            faults.append((i, _same_id("categories", first, i, entry["id"], fault)))
    # Used categories first, which keep the name; then unused ones from the last, because a root category is the first.
    first_with_name: dict[str, int] = {}
    in_use = [(i, entry) for i, entry in distinct if used[entry["id"]]]
    for i, entry in in_use + [row for row in reversed(distinct) if not used[row[1]["id"]]]:
        first = first_with_name.setdefault(entry["name"], entry["id"])
        if first == entry["id"]:
            continue
        found = fault(
            kind="duplicate category",
            record=f"the categories {first} and {entry['id']}",
            what=f"have the same name {shown(entry['name'])}",
            remedy="Give each category a name of its own, or merge the two.",
        )
        faults.append((i, found if used[entry["id"]] else _left_out(found, f"category {entry['id']}")))
    return faults


def _left_out(fault: Fault, label: str = "the second") -> Fault:
    """Returns a fault of an entry that no annotation needs, as a note."""
    return dataclasses.replace(
        fault, severity="note", what=f"{fault.what}; no annotation needs {label}, which is left out"
    )


def _label(section: str, index: int, entry: dict) -> str:
    return f"{section}[{index}]" + (f" (id {shown(entry['id'])})" if "id" in entry else "")
