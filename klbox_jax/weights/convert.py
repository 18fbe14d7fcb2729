"""Loading of a detector's parameters from a checkpoint of ours, torchvision, detectron2, Detectron or KL-Loss."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights import detectron2_names, detectron_names, own_names, torchvision_names
from klbox_jax.weights.listing import listed
from klbox_jax.weights.matching import (
    Matching,
    Path,
    has_another_backbone,
    match_tensors,
    mismatch_message,
)
from klbox_jax.weights.provenance import BoxCoder, Provenance
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.targets import Target
from klbox_jax.weights.weight_file import read_weight_file, without_common_prefix

# Each layout has `recognizes`, `provenance`, `prepare` and `translate`.
LAYOUTS = (own_names, torchvision_names, detectron2_names, detectron_names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The result of loading a checkpoint.

    Attributes:
        provenance: the conventions of the checkpoint, for `check_provenance`.
        loaded: paths of the parameters that were filled, such as 'backbone/stem/kernel'.
        reinitialized: layers that keep their initial values, and the reason.
        unused: names in the file that have no place in the model, without those of an optimizer or a classifier.
    """

    provenance: Provenance
    loaded: tuple[str, ...]
    reinitialized: dict[str, str]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors of a {self.provenance.source} checkpoint were loaded"]
        lines += [
            f"{layer} keeps its initial values: {reason}" for layer, reason in self.reinitialized.items()
        ]
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

    The first bytes of the file determine its format, and the names in it its layout. A file without a detector's
    heads, such as an ImageNet classifier, fills the backbone; its fully connected layers are used if they fit. A
    network for BGR images is converted to read RGB.

    Without `init_partial` every tensor needs a place, and every parameter a tensor. With it, layers of another
    shape, such as the predictors of other classes, keep their initial values, as do box predictors of another
    coding; the backbone has to fit all the same.

    Args:
        params: parameters of the detector, or of a part of it with the same paths.
        path: `.safetensors` (of `save_params` or of torch), a file of torch.save, a pickle of NumPy arrays, an
            exported folder, or the folder of a run, of which the newest checkpoint is read.
        box_coder: that of the model's box head.
        rpn_box_coder: that of the model's RPN.
        pooled_side: bins along each side of the pooled maps that the model's box head reads.
        init_partial: keep the initial values of layers that do not fit (`config.model.init_partial`).

    Raises:
        WeightFileError: the file cannot be read, is of an unknown layout, holds a value that is not finite, or
            does not fit the model.
    """
    path = os.fspath(path)
    state, config = read_weight_file(path)
    layout, state = _find_layout(path, state)
    ours = flatten_dict(params)
    try:
        provenance = layout.provenance(state, config=config)
    except WeightFileError as error:
        raise WeightFileError(f"{path}: {error}") from error
    prepared = layout.prepare(state, provenance=provenance, num_classes=_num_classes(ours))
    targets = {name: layout.translate(name, pooled_side=pooled_side) for name in prepared}
    matching = match_tensors(path, prepared, targets, ours)
    _check_coders(matching, provenance, box_coder, rpn_box_coder)
    if matching.problems or matching.unexpected:
        message = mismatch_message(path, provenance.source, matching, list(state), list(ours))
        _check_fit(message, matching, targets, init_partial=init_partial)
    return _fill(ours, matching, provenance)


def _find_layout(path: str, state: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the layout of the names, and the tensors without a prefix that all names share."""
    for named in (state, *without_common_prefix(state)):
        layout = next((layout for layout in LAYOUTS if layout.recognizes(named)), None)
        if layout is not None:
            return layout, named
    raise WeightFileError(
        f"{path}: holds tensors named {listed(list(state))}, which are neither torchvision's, nor "
        "detectron2's, nor Detectron's, nor ours; rename them to one of these layouts."
    )


def _check_coders(
    matching: Matching, provenance: Provenance, box_coder: BoxCoder, rpn_box_coder: BoxCoder
) -> None:
    """Adds the layers whose boxes are coded in another way to the problems of a matching."""
    coders = {
        ("roi_heads", "box_predictor", "bbox_pred"): (provenance.box_coder, box_coder),
        ("roi_heads", "box_predictor", "bbox_log_var"): (provenance.box_coder, box_coder),
        ("rpn", "head", "anchor_deltas"): (provenance.rpn_box_coder, rpn_box_coder),
    }
    for leaf in matching.values:
        theirs, wanted = coders.get(leaf[:-1], (None, None))
        if theirs != wanted:
            matching.problems[leaf] = f"its boxes are coded by {theirs}, ours by {wanted}"


def _check_fit(
    message: str, matching: Matching, targets: dict[str, Target | None], *, init_partial: bool
) -> None:
    """Raises WeightFileError if a file with problems cannot be loaded in part."""
    if has_another_backbone(matching, targets):
        raise WeightFileError(f"{message} Set config.model.backbone to that of the file.")
    if not init_partial:
        raise WeightFileError(
            f"{message} Build the model that it was trained as, or set config.model.init_partial = True to load "
            "the rest."
        )


def _fill(
    ours: dict[Path, Any], matching: Matching, provenance: Provenance
) -> tuple[dict[str, Any], ConversionReport]:
    # A layer is filled completely or not at all: a trained bias is useless with a random kernel.
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


def _num_classes(ours: dict[Path, Any]) -> int | None:
    bias = ours.get(("roi_heads", "box_predictor", "cls_score", "bias"))
    return None if bias is None else bias.shape[0] - 1
