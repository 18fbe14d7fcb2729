"""Names of torchvision's state dicts: Faster and Mask R-CNN with ResNet-FPN, and its ImageNet classifiers.

The names are those of torchvision 0.29, and the older ones of its published detectors, which torchvision renames when
it loads them. The background is the first class.
"""

import re
from collections.abc import Iterable

import numpy as np

from klbox_jax.models.mobilenet import STAGES
from klbox_jax.models.normalization import EPSILON
from klbox_jax.ops.box_coder import CenterBoxCoder
from klbox_jax.weights import targets
from klbox_jax.weights.provenance import Provenance
from klbox_jax.weights.targets import IGNORED, Target

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

MOBILENET_NORM_NAMES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Category ids between 1 and 90 that COCO does not use; torchvision's heads have outputs for them.
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CLASSES = tuple(row for row in range(91) if row not in UNUSED_COCO_IDS)

# Index in `features` of each convolution of VGG-16, by stage.
VGG_CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_LAYERS = {
    f"features.{index}": f"conv{stage}_{number}"
    for stage, indices in enumerate(VGG_CONVS, start=1)
    for number, index in enumerate(indices, start=1)
}
LINEAR_LAYERS = {
    "roi_heads.box_head.fc6": "fc1",
    "roi_heads.box_head.fc7": "fc2",
    "classifier.0": "fc1",
    "classifier.3": "fc2",
}
# Number of outputs for each class, of the layers that COCO's unused classes are removed from.
CLASS_LAYERS = {
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,
}
# Last layers of the classifiers.
LAST_LAYERS = ("fc", "classifier.1", "classifier.6")


def mobilenet_v2_names() -> dict[tuple[str, ...], str]:
    """Returns torchvision's name of every parameter of `MobileNetV2(with_head=True)`, by its path."""
    names = {}

    def add(path: tuple[str, ...], conv: str, norm: str):
        names[*path, "conv", "kernel"] = f"{conv}.weight"
        for ours, theirs in MOBILENET_NORM_NAMES.items():
            names[*path, "norm", ours] = f"{norm}.{theirs}"

    add(("stem",), "features.0.0", "features.0.1")
    expansions = [expansion for expansion, _, blocks, _ in STAGES for _ in range(blocks)]
    for number, expansion in enumerate(expansions, start=1):
        # Convolutions with an activation are wrapped with their norm; the last one is next to its norm.
        wrapped = ["depthwise"] if expansion == 1 else ["expand", "depthwise"]
        torch_block = f"features.{number}.conv"
        for index, part in enumerate(wrapped):
            add((f"block_{number}", part), f"{torch_block}.{index}.0", f"{torch_block}.{index}.1")
        last = len(wrapped)
        add((f"block_{number}", "project"), f"{torch_block}.{last}", f"{torch_block}.{last + 1}")
    head = len(expansions) + 1
    add(("head",), f"features.{head}.0", f"features.{head}.1")
    return names


MOBILENET_PATHS = {name: path for path, name in mobilenet_v2_names().items()}


def recognizes(names: Iterable[str]) -> bool:
    """Returns True for names of torchvision."""
    return any(name.startswith(("backbone.body.", "layer1.", "features.")) for name in names)


def translate(name: str, *, pooled_side: int) -> Target | None:
    """Returns the place of a tensor, or None if it belongs to another network.

    Args:
        name: name in the state dict.
        pooled_side: bins along each side of the pooled maps that the box head reads.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked" or owner in LAST_LAYERS:
        return IGNORED
    if name in MOBILENET_PATHS:
        path = MOBILENET_PATHS[name]
        # The 1280 channels of the head are read by the classifier alone.
        if path[0] == "head":
            return IGNORED
        return Target(("backbone", *path), targets.conv if path[-1] == "kernel" else targets.same)
    if leaf in targets.NORM_LEAVES and (path := _norm_path(owner)):
        return targets.norm(*path, leaf=leaf)
    if leaf not in ("weight", "bias"):
        return None
    if path := _conv_path(owner):
        return targets.layer(*path, leaf=leaf, weight=targets.conv)
    if owner in LINEAR_LAYERS:
        part = LINEAR_LAYERS[owner]
        weight = targets.linear_after_pooling(pooled_side) if part == "fc1" else targets.linear
        return targets.layer("roi_heads", "box_head", part, leaf=leaf, weight=weight)
    return _predictor(owner, leaf)


def _norm_path(owner: str) -> tuple[str, ...] | None:
    owner = owner.removeprefix("backbone.body.")
    if owner == "bn1":
        return "backbone", "stem_norm"
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(?:bn([1-3])|downsample\.1)", owner):
        part = f"norm{match[3]}" if match[3] else "shortcut_norm"
        return "backbone", f"res{int(match[1]) + 1}_{match[2]}", part
    return None


def _conv_path(owner: str) -> tuple[str, ...] | None:
    body = owner.removeprefix("backbone.body.")
    if body == "conv1":
        return "backbone", "stem"
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(?:conv([1-3])|downsample\.0)", body):
        part = f"conv{match[3]}" if match[3] else "shortcut"
        return "backbone", f"res{int(match[1]) + 1}_{match[2]}", part
    if owner in VGG_LAYERS:
        return "backbone", VGG_LAYERS[owner]
    # The second alternative of each pattern is the older spelling.
    if match := re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)(?:\.0|)", owner):
        kind = {"inner": "fpn_lateral", "layer": "fpn_output"}[match[1]]
        return "fpn", f"{kind}{int(match[2]) + 2}"
    if re.fullmatch(r"rpn\.head\.conv(?:\.0\.0|)", owner):
        return "rpn", "head", "conv"
    if match := re.fullmatch(r"roi_heads\.mask_head\.(?:(\d)\.0|mask_fcn(\d))", owner):
        number = int(match[1]) + 1 if match[1] else int(match[2])
        return "roi_heads", "mask_head", f"mask_fcn{number}"
    return {
        "rpn.head.cls_logits": ("rpn", "head", "objectness_logits"),
        "rpn.head.bbox_pred": ("rpn", "head", "anchor_deltas"),
    }.get(owner)


def _predictor(owner: str, leaf: str) -> Target | None:
    path = tuple(owner.split("."))
    match owner:
        case "roi_heads.box_predictor.cls_score":
            return targets.layer(*path, leaf=leaf, weight=targets.linear, rows=targets.background_last)
        case "roi_heads.box_predictor.bbox_pred":
            return targets.layer(*path, leaf=leaf, weight=targets.linear, rows=targets.without_background(4))
        case "roi_heads.mask_predictor.conv5_mask":
            return targets.layer("roi_heads", "mask_head", path[-1], leaf=leaf, weight=targets.deconv)
        case "roi_heads.mask_predictor.mask_fcn_logits":
            rows = targets.without_background(1)
            return targets.layer(
                "roi_heads", "mask_head", path[-1], leaf=leaf, weight=targets.conv, rows=rows
            )
    return None


def prepare(
    state: dict[str, np.ndarray], *, provenance: Provenance, num_classes: int | None
) -> dict[str, np.ndarray]:
    """Returns the state dict without COCO's unused classes, and with variances for our epsilon of batch norm.

    Args:
        state: tensors by name.
        provenance: its conventions, from `provenance`.
        num_classes: K of our model. If it is 80, the unused rows of heads with COCO's 91 rows (with the background)
            are removed, so that class `i` is the i-th category by id.
    """
    state = dict(state)
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        per_class = CLASS_LAYERS.get(owner, 0)
        if num_classes == 80 and per_class and value.shape[:1] == (91 * per_class,):
            rows = value.reshape(91, per_class, *value.shape[1:])[list(COCO_CLASSES)]
            state[name] = rows.reshape(-1, *value.shape[1:])
        if leaf == "running_var":
            state[name] = value + np.float32(_norm_epsilon(state) - EPSILON)
    return state


def _norm_epsilon(state: dict[str, np.ndarray]) -> float:
    # Detectors that torchvision published before its frozen batch norm had an epsilon; torchvision sets it to zero
    # when it loads them. Their names are the older ones.
    return 0.0 if "backbone.fpn.inner_blocks.0.weight" in state else 1e-5


def provenance(state: dict[str, np.ndarray], *, config: str) -> Provenance:
    """Returns torchvision's conventions; `config` has no part in them."""
    del config
    is_resnet = any(name.removeprefix("backbone.body.").startswith("layer1.") for name in state)
    fields = {
        "source": "torchvision",
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "channel_order": "rgb",
        "stride_in_1x1": False if is_resnet else None,
    }
    if any(name.startswith("roi_heads.") for name in state):
        fields |= {
            "box_coder": CenterBoxCoder((10.0, 10.0, 5.0, 5.0)),
            "rpn_box_coder": CenterBoxCoder((1.0, 1.0, 1.0, 1.0)),
            "anchor_offset": 0.0,
            "aligned_pooling": False,
        }
    return Provenance(**fields)
