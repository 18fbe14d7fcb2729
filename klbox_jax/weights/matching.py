"""Assignment of the tensors of a weight file to the parameters of a model."""

import dataclasses
from typing import Any

import numpy as np

from klbox_jax.weights.listing import MAX_LISTED, listed, nearest
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.targets import Target

MISSING = "the file has none"

Path = tuple[str, ...]


@dataclasses.dataclass
class Matching:
    """The assignment of a file's tensors to the parameters of a model, and its problems.

    Attributes:
        values: the tensor of each parameter, in our layout.
        problems: parameters without a fitting tensor, and the reason.
        unexpected: names of tensors that should have a place in the model, but have none.
        unused: names of tensors that are not needed.
    """

    values: dict[Path, np.ndarray]
    problems: dict[Path, str]
    unexpected: list[str]
    unused: list[str]


def match_tensors(
    path: str, state: dict[str, np.ndarray], targets: dict[str, Target | None], ours: dict[Path, Any]
) -> Matching:
    """Assigns the tensors of a file to parameters.

    Args:
        path: path of the file, for messages.
        state: its tensors by name.
        targets: the place and transform of each tensor; None for a tensor of another network.
        ours: the parameters of the model by path, anything with a `shape`.

    Raises:
        WeightFileError: two tensors have one place, or a value is not finite.
    """
    is_detector = any(target and {"rpn", "box_predictor"} & set(target.path) for target in targets.values())
    matching = Matching({}, {}, [], [])
    for name, value in state.items():
        target = targets[name]
        if target is None:
            matching.unexpected.append(name)
            continue
        if not target.path:
            continue
        leaf = _place(target.path, ours)
        is_required = is_detector or target.path[0] == "backbone"
        if leaf is None:
            (matching.unexpected if is_required else matching.unused).append(name)
            continue
        if leaf in matching.values:
            raise WeightFileError(f"{path}: holds {'/'.join(leaf)} under two names, one of them {name!r}.")
        turned = target.transform(value)
        if turned.shape == ours[leaf].shape:
            if not np.isfinite(turned.astype(np.float32)).all():
                raise WeightFileError(f"{path}: {name!r} is not finite; give an earlier checkpoint.")
            matching.values[leaf] = turned
        elif is_required:
            matching.problems[leaf] = f"{name} has shape {turned.shape} here, not {ours[leaf].shape}"
        else:
            matching.unused.append(name)
    for leaf in ours:
        is_required = is_detector or leaf[0] == "backbone"
        if is_required and leaf not in matching.values and leaf not in matching.problems:
            matching.problems[leaf] = MISSING
    return matching


def has_another_backbone(matching: Matching, targets: dict[str, Target | None]) -> bool:
    """Returns True if blocks of the backbone are missing, unexpected or of another shape, which no fine-tuning has."""
    unexpected = [targets[name].path[0] for name in matching.unexpected if targets[name]]
    return "backbone" in unexpected or any(leaf[0] == "backbone" for leaf in matching.problems)


def _place(target: Path, ours: dict[Path, Any]) -> Path | None:
    """Returns the path of a parameter of our model for the `target` of a table, or None."""
    places = [target]
    # In a C4 detector the last stage is in the box head; VGG's two layers have Caffe's names.
    if target[:1] == ("backbone",):
        places.append(("roi_heads", "box_head", *target[1:]))
    if target[:2] == ("roi_heads", "box_head"):
        places.append(("backbone", *target[2:]))
        places.append((*target[:2], {"fc1": "fc6", "fc2": "fc7"}.get(target[2], target[2]), *target[3:]))
    return next((place for place in places if place in ours), None)


def mismatch_message(path: str, source: str, matching: Matching, names: list[str], ours: list[Path]) -> str:
    """Returns the first sentences of the message about a file that does not fit.

    Args:
        path: path of the file.
        source: the code that wrote it.
        matching: its tensors and the problems.
        names: all names in the file.
        ours: paths of the parameters of the model.
    """
    parts = []
    if matching.problems:
        problems = []
        # The search for similar names is slow, so it is done for the listed ones only.
        for number, (leaf, reason) in enumerate(matching.problems.items()):
            near = nearest(".".join(leaf), names) if reason == MISSING and number < MAX_LISTED else ""
            problems.append(f"{'/'.join(leaf)} ({reason}{near})")
        parts.append(f"parameters without a fitting tensor: {listed(problems)}")
    if matching.unexpected:
        paths = [".".join(leaf) for leaf in ours]
        unknown = [f"{name} (unknown{nearest(name, paths)})" for name in matching.unexpected[:MAX_LISTED]]
        unknown += matching.unexpected[MAX_LISTED:]
        parts.append(f"tensors that the model has no place for: {listed(unknown)}")
    return f"{path}: this {source} checkpoint does not fit the model; {'; '.join(parts)}."
