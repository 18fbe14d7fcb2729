"""Names of Detectron's blobs, and of the KL-Loss release, which is built on it.

Networks read BGR images, with MSRA's ResNet or VGG. Batch norm is folded to a factor and a shift. The background is
the first class, and has boxes and masks too. KL-Loss (`XYXY` in its config) codes corners, also in the RPN, in the
order x1, x2, y1, y2, and has the log variances in `bbox_pred_std`.
"""

import re
from collections.abc import Iterable

import numpy as np

from klbox_jax.models.normalization import EPSILON
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights import targets
from klbox_jax.weights.provenance import Provenance
from klbox_jax.weights.targets import IGNORED, Target

# In RGB order.
PIXEL_MEAN = (122.7717, 115.9465, 102.9801)
PIXEL_STD = (1.0, 1.0, 1.0)

LEAVES = {"w": "weight", "b": "bias"}
NORM_LEAVES = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
NORMS = {"1": "shortcut_norm", "2a": "norm1", "2b": "norm2", "2c": "norm3"}
RPN_LAYERS = {"conv_rpn": "conv", "rpn_cls_logits": "objectness_logits", "rpn_bbox_pred": "anchor_deltas"}
# The optimizer's, and the classifier's that a detector carries along.
UNUSED = re.compile(r".*_momentum|(fc1000|fc8|pred)_[wb]|lr")
# The order x1, x2, y1, y2 among x1, y1, x2, y2; it is its own inverse.
EDGES = [0, 2, 1, 3]


def recognizes(names: Iterable[str]) -> bool:
    """Returns True for names of Detectron."""
    return any(re.fullmatch(r"res2_0_branch2a_w|conv1_w|conv1_1_w", name) for name in names)


def translate(name: str, *, pooled_side: int) -> Target | None:
    """Returns the place of a blob, or None if it belongs to another network.

    Args:
        name: name of the blob; that of a ResNet's first convolution as `prepare` renames it.
        pooled_side: bins along each side of the pooled maps that the box head reads.
    """
    if UNUSED.fullmatch(name):
        return IGNORED
    if match := re.fullmatch(r"(.+)_bn_(s|b|rm|riv)", name):
        path = _norm_path(match[1])
        return path and targets.norm(*path, leaf=NORM_LEAVES[match[2]])
    owner, _, leaf = name.rpartition("_")
    if leaf not in LEAVES:
        return None
    leaf = LEAVES[leaf]
    if path := _conv_path(owner):
        rows = targets.without_background(1) if owner == "mask_fcn_logits" else targets.same
        return targets.layer(*path, leaf=leaf, weight=targets.conv, rows=rows)
    match owner:
        case "fc6":
            weight = targets.linear_after_pooling(pooled_side)
            return targets.layer("roi_heads", "box_head", "fc1", leaf=leaf, weight=weight)
        case "fc7":
            return targets.layer("roi_heads", "box_head", "fc2", leaf=leaf, weight=targets.linear)
        case "cls_score":
            path, rows = ("roi_heads", "box_predictor", "cls_score"), targets.background_last
            return targets.layer(*path, leaf=leaf, weight=targets.linear, rows=rows)
        case "bbox_pred" | "bbox_pred_std":
            part = {"bbox_pred": "bbox_pred", "bbox_pred_std": "bbox_log_var"}[owner]
            path, rows = ("roi_heads", "box_predictor", part), targets.without_background(4)
            return targets.layer(*path, leaf=leaf, weight=targets.linear, rows=rows)
        case "conv5_mask":
            return targets.layer("roi_heads", "mask_head", owner, leaf=leaf, weight=targets.deconv)
    return None


def _norm_path(owner: str) -> tuple[str, ...] | None:
    if owner == "res_conv1":
        return "backbone", "stem_norm"
    if match := re.fullmatch(r"(res[2-5]_\d+)_branch(1|2a|2b|2c)", owner):
        return "backbone", match[1], NORMS[match[2]]
    return None


def _conv_path(owner: str) -> tuple[str, ...] | None:
    if owner == "stem":
        return "backbone", "stem"
    if match := re.fullmatch(r"(res[2-5]_\d+)_branch(1|2a|2b|2c)", owner):
        return "backbone", match[1], BRANCHES[match[2]]
    # VGG-16 and VGG-CNN-M-1024.
    if re.fullmatch(r"conv[1-5](_[1-3])?", owner):
        return "backbone", owner
    # Blobs are named after the sum that they enter or leave, with the number of the stage's last block.
    if match := re.fullmatch(r"fpn_(inner_)?res([2-5])_\d+_sum(_lateral)?", owner):
        return "fpn", f"{'fpn_lateral' if match[1] else 'fpn_output'}{match[2]}"
    # The levels share the layers of the finest.
    if match := re.fullmatch(r"(conv_rpn|rpn_cls_logits|rpn_bbox_pred)(_fpn\d)?", owner):
        return "rpn", "head", RPN_LAYERS[match[1]]
    if match := re.fullmatch(r"_\[mask\]_fcn(\d)", owner):
        return "roi_heads", "mask_head", f"mask_fcn{match[1]}"
    if owner == "mask_fcn_logits":
        return "roi_heads", "mask_head", owner
    return None


def prepare(
    state: dict[str, np.ndarray], *, provenance: Provenance, num_classes: int | None
) -> dict[str, np.ndarray]:
    """Returns the blobs with the first convolution converted to RGB, edges in our order and complete batch norms.

    A ResNet's `conv1` is renamed `stem`, because VGG-CNN-M-1024 has a `conv1` of its own. Its bias is left out: the
    network has none, and the converted file holds numerical noise.
    """
    del num_classes
    prepared = {}
    is_resnet = _is_resnet(state)
    for name, value in state.items():
        if name in ("conv1_w", "conv1_1_w"):
            value = value[:, ::-1]
        if isinstance(provenance.box_coder, CornerBoxCoder) and re.match(r"(rpn_)?bbox_pred", name):
            value = _reorder_edges(value)
        if is_resnet and name == "conv1_w":
            name = "stem_w"
        if not (is_resnet and name == "conv1_b"):
            prepared[name] = value
    for name in state:
        # The file has a factor and a shift only; with these statistics the norm applies them unchanged.
        if name.endswith("_bn_s") and f"{name[:-1]}rm" not in state:
            prepared[f"{name[:-1]}rm"] = np.zeros_like(state[name])
            prepared[f"{name[:-1]}riv"] = np.full_like(state[name], 1.0 - EPSILON)
    return prepared


def _reorder_edges(value: np.ndarray) -> np.ndarray:
    if not value.ndim or value.shape[0] % 4:
        return value
    return value.reshape(-1, 4, *value.shape[1:])[:, EDGES].reshape(value.shape)


def _is_resnet(state: dict[str, np.ndarray]) -> bool:
    return "res2_0_branch2a_w" in state


def provenance(state: dict[str, np.ndarray], *, config: str) -> Provenance:
    """Returns the conventions of Detectron, or of KL-Loss.

    Args:
        state: the blobs.
        config: the YAML text that Detectron stores with them; empty if there is none.
    """
    has_corners = _flag(config, "XYXY", default="bbox_pred_std_w" in state)
    fields = {
        "source": "KL-Loss" if has_corners else "Detectron",
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "channel_order": "bgr",
        "stride_in_1x1": _flag(config, "STRIDE_1X1", default=True) if _is_resnet(state) else None,
        "plus_one_widths": True,
    }
    if "cls_score_w" in state:
        corner, center = CornerBoxCoder, CenterBoxCoder
        fields |= {
            "box_coder": corner((10.0,) * 4) if has_corners else center((10.0, 10.0, 5.0, 5.0)),
            "rpn_box_coder": corner((1.0,) * 4) if has_corners else center((1.0,) * 4),
            # Their anchors are centred between the first and the last pixel of a cell.
            "anchor_offset": 0.5,
            "aligned_pooling": False,
        }
    return Provenance(**fields)


def _flag(config: str, key: str, *, default: bool) -> bool:
    match = re.search(rf"^\s*{key}: (true|false)\s*$", config, re.MULTILINE | re.IGNORECASE)
    return match[1].lower() == "true" if match else default
