"""Fills a detector's parameters from a checkpoint of ours, torchvision, detectron2, Detectron or KL-Loss."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights import detectron2_names, detectron_names, own_names, torchvision_names
from klbox_jax.weights.detectron_file import arrays_of, load_numpy_pickle
from klbox_jax.weights.listing import MAX_LISTED, listed, nearest
from klbox_jax.weights.provenance import BoxCoder, Provenance
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.safetensors_file import CONVENTIONS, read_safetensors
from klbox_jax.weights.targets import Target
from klbox_jax.weights.torch_file import LEGACY_START, ZIP_START, read_torch_file

# Each has `recognizes`, `provenance`, `prepare` and `translate`.
LAYOUTS = (own_names, torchvision_names, detectron2_names, detectron_names)
MISSING = "the file has none"

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What became of a checkpoint.

    Attributes:
        provenance: the conventions of the checkpoint, for `check_provenance`.
        loaded: paths of the parameters that were filled, such as 'backbone/stem/kernel'.
        reinitialized: layers that keep their fresh values, and why.
        unused: names in the file that the model has no place for, without an optimizer's or a classifier's.
    """

    provenance: Provenance
    loaded: tuple[str, ...]
    reinitialized: dict[str, str]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors of a {self.provenance.source} checkpoint were loaded"]
        lines += [f"{layer} keeps its fresh values: {reason}" for layer, reason in self.reinitialized.items()]
        if self.unused:
            lines.append(f"not used: {listed(list(self.unused))}")
        return "; ".join(lines)


def load_weights(
    params: dict[str, Any],
    path: str | os.PathLike,
    *,
    box_coder: BoxCoder = CornerBoxCoder(),  # noqa: B008
    rpn_box_coder: BoxCoder = CenterBoxCoder((1.0, 1.0, 1.0, 1.0)),  # noqa: B008
    pooled_side: int = 7,
    init_partial: bool = False,
) -> tuple[dict[str, Any], ConversionReport]:
    """Returns the parameters with the values of a checkpoint, and a report.

    The format is told by the file's first bytes and the layout by the names in it. A file without a detector's
    heads, such as an ImageNet classifier, fills the backbone; its fully connected layers are taken where they
    fit. A network for BGR images is turned to read RGB.

    Without `init_partial` every tensor has to find its place, and every parameter its tensor. With it, layers
    of another shape, such as the predictors of other classes, keep their fresh values, as do box predictors of
    another coding; the backbone has to fit all the same.

    Args:
        params: of the detector, or of a part of it with the same paths.
        path: the file; `.safetensors` of `save_params`, a `.pth` of torch.save, or a `.pkl` of NumPy arrays.
        box_coder: of the model's box head.
        rpn_box_coder: of the model's RPN.
        pooled_side: bins along each side of the pooled maps that the model's box head reads.
        init_partial: keep what does not fit as it is (`config.model.init_partial`).

    Raises:
        WeightFileError: the file cannot be read, is of an unknown layout, holds a value that is not finite, or
            does not fit the model.
    """
    path = os.fspath(path)
    state, config = _read(path)
    layout = next((layout for layout in LAYOUTS if layout.recognizes(state)), None)
    if layout is None:
        raise WeightFileError(
            f"{path}: holds tensors named {listed(list(state))}, which are neither torchvision's, nor "
            "detectron2's, nor Detectron's, nor ours; rename them to one of these layouts."
        )
    ours = flatten_dict(params)
    try:
        provenance = layout.provenance(state, config=config)
    except WeightFileError as error:
        raise WeightFileError(f"{path}: {error}") from error
    prepared = layout.prepare(state, provenance=provenance, num_classes=_num_classes(ours))
    targets = {name: layout.translate(name, pooled_side=pooled_side) for name in prepared}

    matching = _match(path, prepared, targets, ours)
    coders = {
        ("roi_heads", "box_predictor", "bbox_pred"): (provenance.box_coder, box_coder),
        ("roi_heads", "box_predictor", "bbox_log_var"): (provenance.box_coder, box_coder),
        ("rpn", "head", "anchor_deltas"): (provenance.rpn_box_coder, rpn_box_coder),
    }
    for leaf in matching.values:
        theirs, wanted = coders.get(leaf[:-1], (None, None))
        if theirs != wanted:
            matching.problems[leaf] = f"its boxes are coded by {theirs}, ours by {wanted}"
    if matching.problems or matching.unexpected:
        message = _mismatch_message(path, provenance, matching, list(state), list(ours))
        if _has_another_backbone(matching, targets):
            raise WeightFileError(f"{message} Set config.model.backbone to that of the file.")
        if not init_partial:
            raise WeightFileError(
                f"{message} Build the model that it was trained as, or set config.model.init_partial = True to load "
                "the rest."
            )

    # A layer is filled whole or not at all: a trained bias is worth nothing under a fresh kernel.
    reinitialized: dict[Path, str] = {}
    for leaf, reason in matching.problems.items():
        reinitialized.setdefault(leaf[:-1], reason)
    values = {leaf: value for leaf, value in matching.values.items() if leaf[:-1] not in reinitialized}
    filled = {leaf: jnp.asarray(value, ours[leaf].dtype) for leaf, value in values.items()}
    report = ConversionReport(
        provenance=provenance,
        loaded=tuple("/".join(leaf) for leaf in filled),
        reinitialized={"/".join(layer): reason for layer, reason in reinitialized.items()},
        unused=tuple(matching.unused + matching.unexpected),
    )
    return unflatten_dict(ours | filled), report


@dataclasses.dataclass
class _Matching:
    """Which tensor fills which parameter, and what is wrong.

    `problems` are parameters with a reason, `unexpected` and `unused` names in the file: the first ought to
    have had a place.
    """

    values: dict[Path, np.ndarray]
    problems: dict[Path, str]
    unexpected: list[str]
    unused: list[str]


def _read(path: str) -> tuple[dict[str, np.ndarray], str]:
    """Returns the tensors without the prefix of a parallel run, and the config that is stored beside them.

    Of our own files that is the text of their conventions. They alone are told by the name: they begin with a
    length.
    """
    if path.endswith(".safetensors"):
        state, metadata = read_safetensors(path)
        return state, metadata.get(CONVENTIONS, "")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error}); check the path.") from error
    config = ""
    if start.startswith(ZIP_START) or start == LEGACY_START:
        state = read_torch_file(path)
    else:
        root = load_numpy_pickle(path)
        state = arrays_of(root, path)
        text = dict.get(root, "cfg")
        config = text if isinstance(text, str) else ""
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state, config


def _num_classes(ours: dict[Path, Any]) -> int | None:
    bias = ours.get(("roi_heads", "box_predictor", "cls_score", "bias"))
    return None if bias is None else bias.shape[0] - 1


def _match(
    path: str, state: dict[str, np.ndarray], targets: dict[str, Target | None], ours: dict[Path, Any]
) -> _Matching:
    is_detector = any(target and {"rpn", "box_predictor"} & set(target.path) for target in targets.values())
    matching = _Matching({}, {}, [], [])
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


def _has_another_backbone(matching: _Matching, targets: dict[str, Target | None]) -> bool:
    """Whether a block of the backbone is missing, of another shape or too much: never a case for fine-tuning."""
    unexpected = [targets[name].path[0] for name in matching.unexpected if targets[name]]
    return "backbone" in unexpected or any(leaf[0] == "backbone" for leaf in matching.problems)


def _place(target: Path, ours: dict[Path, Any]) -> Path | None:
    """Returns the path under which our model has what a table places at `target`, or None."""
    places = [target]
    # A C4 detector has the last stage in its head; VGG's two layers keep Caffe's names.
    if target[:1] == ("backbone",):
        places.append(("roi_heads", "box_head", *target[1:]))
    if target[:2] == ("roi_heads", "box_head"):
        places.append(("backbone", *target[2:]))
        places.append((*target[:2], {"fc1": "fc6", "fc2": "fc7"}.get(target[2], target[2]), *target[3:]))
    return next((place for place in places if place in ours), None)


def _mismatch_message(
    path: str, provenance: Provenance, matching: _Matching, names: list[str], ours: list[Path]
) -> str:
    parts = []
    if matching.problems:
        problems = []
        # To look for near names takes a while: only of those that are listed.
        for number, (leaf, reason) in enumerate(matching.problems.items()):
            near = nearest(".".join(leaf), names) if reason == MISSING and number < MAX_LISTED else ""
            problems.append(f"{'/'.join(leaf)} ({reason}{near})")
        parts.append(f"parameters without a fitting tensor: {listed(problems)}")
    if matching.unexpected:
        paths = [".".join(leaf) for leaf in ours]
        unknown = [f"{name} (unknown{nearest(name, paths)})" for name in matching.unexpected[:MAX_LISTED]]
        unknown += matching.unexpected[MAX_LISTED:]
        parts.append(f"tensors that the model has no place for: {listed(unknown)}")
    return f"{path}: this {provenance.source} checkpoint does not fit the model; {'; '.join(parts)}."
