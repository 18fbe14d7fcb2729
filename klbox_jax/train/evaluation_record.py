"""Compares an evaluation that is about to start with the one that its folder holds."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from klbox_jax.files import read_json
from klbox_jax.train.best_checkpoint import OWN_TAGS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


def check_name(name: str) -> None:
    """Raises ValueError unless a name can be that of an evaluation: of its folder and of its tags in the logs."""
    if name in OWN_TAGS or name.endswith(".json"):
        raise ValueError(
            f"--name={name} is the name of a metric or a file; choose another, such as {name[:3]}_2"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--name={name} cannot be the name of a folder; use letters, digits and _ . + - and no slash, such as hard"
        )


def check_same_evaluation(
    file: pathlib.Path, name: str, *, data: Mapping[str, Any], postprocess: Mapping[str, Any]
) -> None:
    """Raises ValueError if a `metrics.json` comes from another evaluation, which would be lost.

    Args:
        file: the file that the evaluation would replace; it may be missing.
        name: name of the evaluation, or "".
        data: `data`, `data_root` and `data_fingerprint` as the file has them.
        postprocess: the post-processing.
    """
    try:
        stored = read_json(file)
        before = dict(stored["postprocess"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # None, or one that cannot be read.
    changes = [
        f"{field} = {before[field]!r}, now {value!r}"
        for field, value in postprocess.items()
        if field in before and before[field] != value
    ]
    changes += [
        f"{field} = {stored[field]!r}, now {value!r}"
        for field, value in data.items()
        # Evaluations of older versions do not have all of them.
        if value and stored.get(field) and stored[field] != value
    ]
    if changes:
        under = f"under the name {name} " if name else ""
        raise ValueError(
            f"{file.parent} holds an evaluation {under}with {'; '.join(changes)}. Give this one "
            f"{'another' if name else 'a'} name with --name=NAME, or delete {file} to replace it"
        )
