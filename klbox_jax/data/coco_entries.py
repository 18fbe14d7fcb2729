"""Reads the JSON of a COCO annotation file, and checks each of its entries by itself."""

import functools
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from klbox_jax.data.image import pixel_limit
from klbox_jax.data.source import DataError, Fault, Report, shown

# COCO's largest file has half a gigabyte. Python's objects take about ten times as much.
MAX_FILE_BYTES = 2**33
# JPEG's own limit, and more than any canvas holds.
MAX_SIDE = 2**16 - 1

# The index of an entry in its list, and what is wrong with it.
EntryFaults = Sequence[tuple[int, Fault]]
# The index of an entry in its section of the file, whatever was left out before it.
_Rows = list[tuple[int, Any]]


def is_image_id(value: Any) -> bool:
    """Whether a value is a 32-bit integer: a batch carries its image ids as such."""
    return type(value) is int and -(2**31) <= value < 2**31


def _is_id(value: Any) -> bool:
    # The evaluator keeps ids in float64. COCO's own crowd annotations exceed 32 bits.
    return type(value) is int and abs(value) < 2**53


def _is_finite(value: Any) -> bool:
    # Python's JSON reader lets NaN, Infinity and integers beyond any float through.
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_IMAGE_ID = (is_image_id, "a 32-bit integer")
_ID = (_is_id, "an integer")
_SIZE = (
    lambda value: type(value) is int and 0 < value <= MAX_SIDE,
    f"a positive integer up to {MAX_SIDE}",
)
_BOX = (
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value)),
    "four finite numbers (x, y, width, height)",
)
# What each entry must hold. `area` and `iscrowd` may be absent, as many exporters leave them out. JSON can write
# halves of characters, which no terminal takes, and the names of classes end up there.
_FIELDS = {
    "images": {"id": _IMAGE_ID, "file_name": (_is_text, "a text"), "height": _SIZE, "width": _SIZE},
    "annotations": {"id": _ID, "image_id": _IMAGE_ID, "category_id": _ID, "bbox": _BOX},
    "categories": {
        "id": _ID,
        "name": (lambda value: _is_text(value) and value.isprintable(), "a printable text"),
    },
}
_OPTIONAL_FIELDS = {
    "area": (lambda value: _is_finite(value) and value >= 0, "a finite number"),
    "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
}


def read_json(path: str) -> dict:
    """Returns the object in a JSON file; raises DataError."""
    fault = functools.partial(Fault, kind="unreadable annotations", file=path, severity="fatal")
    check_path = "Check the data set's path and the split."
    try:
        size = os.path.getsize(path)
        # `isfile` also keeps a pipe from blocking the reader for ever.
        if not os.path.isfile(path):
            raise DataError(fault(what="is no file", remedy=check_path))
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
        too_large = "needs more memory than there is"
        raise DataError(fault(what=too_large, remedy="Split the data set into several.")) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            fault(what=f"is not valid JSON: {reason}", remedy="Restore or export it again.")
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            fault(what="holds no JSON object", remedy="Is this a COCO instances file? Export it again.")
        )
    return content


def sound_entries(path: str, content: dict, section: str, report: Report) -> list[dict]:
    """Returns the entries of a section that have all their fields, and ids and category names of their own.

    Args:
        path: of the file, for messages.
        content: its JSON.
        section: "images", "annotations" or "categories".
        report: takes the faults of one check after the other. Those of categories are fatal: with fewer classes
            it would be another problem.

    Raises:
        DataError: there is no such section, or it is empty.
    """
    fields = _FIELDS[section]
    entries = content.get(section)
    if not isinstance(entries, list) or (not entries and section != "annotations"):
        is_list = isinstance(entries, list)
        raise DataError(
            Fault(
                kind="unreadable annotations",
                file=path,
                what=f"has an empty list '{section}'" if is_list else f"has no list '{section}'",
                remedy="Is this a COCO instances file? Export it again, with all sections.",
                severity="fatal",
            )
        )
    fault = functools.partial(Fault, file=path, severity="fatal" if section == "categories" else "error")
    rows = list(enumerate(entries))
    correct = "Correct or remove the entry."
    faults = [
        (i, fault(kind="no object", record=f"{section}[{i}]", what="is not an object", remedy=correct))
        for i, entry in rows
        if not isinstance(entry, dict)
    ]
    rows = _without_faulty(rows, faults, report)
    add = "Add what is missing, or remove the entry."
    faults = [
        (i, fault(kind="missing field", record=_label(section, i, entry), what=f"has no '{key}'", remedy=add))
        for i, entry in rows
        for key in fields
        if key not in entry
    ]
    rows = _without_faulty(rows, faults, report)
    faults = [
        (
            i,
            fault(
                kind=f"wrong '{key}'",
                record=f"'{key}' of {_label(section, i, entry)}",
                what=f"is {shown(entry[key])}, not {expected}",
                remedy=correct,
            ),
        )
        for i, entry in rows
        for key, (accepts, expected) in _expected(section).items()
        if key in entry and not accepts(entry[key])
    ]
    rows = _without_faulty(rows, faults, report)
    first_with: dict[int, int] = {}
    faults = [
        (
            i,
            fault(
                kind="duplicate id",
                record=f"{section}[{first_with[entry['id']]}] and {section}[{i}]",
                what=f"have the same id {entry['id']}",
                remedy="Give each entry an id of its own.",
            ),
        )
        for i, entry in rows
        if first_with.setdefault(entry["id"], i) != i
    ]
    rows = _without_faulty(rows, faults, report)
    if section == "images":
        rows = _without_faulty(rows, _size_faults(rows, fault), report)
    if section == "categories":
        rows = _without_faulty(rows, _name_faults(rows, fault), report)
    return [entry for _, entry in rows]


def _without_faulty(rows: _Rows, faults: EntryFaults, report: Report) -> _Rows:
    """Reports faults, and returns the rows that have none."""
    report([fault for _, fault in faults])
    at_fault = {index for index, _ in faults}
    return [row for row in rows if row[0] not in at_fault] if faults else rows


def _expected(section: str) -> dict:
    return _FIELDS[section] | (_OPTIONAL_FIELDS if section == "annotations" else {})


def _label(section: str, index: int, entry: dict) -> str:
    return f"{section}[{index}]" + (f" (id {shown(entry['id'])})" if "id" in entry else "")


def _size_faults(images: _Rows, fault: functools.partial) -> EntryFaults:
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
        for i, entry in images
        if entry["height"] * entry["width"] > limit
    ]


def _name_faults(categories: _Rows, fault: functools.partial) -> EntryFaults:
    first_with: dict[str, int] = {}
    return [
        (
            i,
            fault(
                kind="duplicate category",
                record=f"the categories {first_with[entry['name']]} and {entry['id']}",
                what=f"have the same name {shown(entry['name'])}",
                remedy="Give each category a name of its own, or merge the two.",
            ),
        )
        for i, entry in categories
        if first_with.setdefault(entry["name"], entry["id"]) != entry["id"]
    ]
