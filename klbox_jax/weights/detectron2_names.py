"""Names of detectron2's checkpoints and model zoo: Faster and Mask R-CNN with ResNet, FPN or C4.

Classes are ordered as ours, with the background last and without boxes of its own. The prefix of the whole backbone
may be missing, as in the zoo's ImageNet files, which are torchvision's weights under detectron2's names.
"""

import re
from collections.abc import Iterable

import numpy as np

from klbox_jax.ops.box_coder import CenterBoxCoder
from klbox_jax.weights import targets, torchvision_names
from klbox_jax.weights.provenance import Provenance
from klbox_jax.weights.targets import IGNORED, Target

# detectron2's defaults, in RGB order: networks that start from MSRA's ResNet.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (1.0, 1.0, 1.0)

BACKBONE_PREFIX = re.compile(r"^(backbone\.(bottom_up\.)?)?(?=(stem|res[2-5])\.)")
CONV_LAYERS = {
    "proposal_generator.rpn_head.conv": ("rpn", "head", "conv"),
    "proposal_generator.rpn_head.objectness_logits": ("rpn", "head", "objectness_logits"),
    "proposal_generator.rpn_head.anchor_deltas": ("rpn", "head", "anchor_deltas"),
    "roi_heads.mask_head.predictor": ("roi_heads", "mask_head", "mask_fcn_logits"),
}
LINEAR_LAYERS = {
    "roi_heads.box_head.fc2": ("roi_heads", "box_head", "fc2"),
    "roi_heads.box_predictor.cls_score": ("roi_heads", "box_predictor", "cls_score"),
    "roi_heads.box_predictor.bbox_pred": ("roi_heads", "box_predictor", "bbox_pred"),
}
# Statistics, anchors and the classifier.
UNUSED = re.compile(
    r"pixel_(mean|std)|(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+|.*\.num_batches_tracked"
    r"|(stem\.fc|linear|fc1000)\.(weight|bias)"
)


def recognizes(names: Iterable[str]) -> bool:
    """Returns True for names of detectron2."""
    return any(re.search(r"(^|\.)res2\.0\.conv1\.weight$", name) for name in names)


def translate(name: str, *, pooled_side: int) -> Target | None:
    """Returns the place of a tensor, or None if it belongs to another network.

    Args:
        name: name in the state dict.
        pooled_side: bins along each side of the pooled maps that the box head reads.
    """
    if UNUSED.fullmatch(name):
        return IGNORED
    owner, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"(.+)\.norm", owner):
        path = _resnet_path(match[1])
        if path is None or leaf not in targets.NORM_LEAVES:
            return None
        part = {"stem": "stem_norm", "shortcut": "shortcut_norm"}.get(
            path[-1], path[-1].replace("conv", "norm")
        )
        return targets.norm(*path[:-1], part, leaf=leaf)
    if leaf not in ("weight", "bias"):
        return None
    if path := CONV_LAYERS.get(owner) or _resnet_path(owner) or _numbered_path(owner):
        return targets.layer(*path, leaf=leaf, weight=targets.conv)
    if path := LINEAR_LAYERS.get(owner):
        return targets.layer(*path, leaf=leaf, weight=targets.linear)
    if owner == "roi_heads.box_head.fc1":
        weight = targets.linear_after_pooling(pooled_side)
        return targets.layer("roi_heads", "box_head", "fc1", leaf=leaf, weight=weight)
    if owner == "roi_heads.mask_head.deconv":
        return targets.layer("roi_heads", "mask_head", "conv5_mask", leaf=leaf, weight=targets.deconv)
    return None


def _resnet_path(owner: str) -> tuple[str, ...] | None:
    prefix, owner = ("backbone",), BACKBONE_PREFIX.sub("", owner)
    if owner.startswith("roi_heads.res5."):
        # The last stage of a C4 detector is its box head.
        prefix, owner = ("roi_heads", "box_head"), owner.removeprefix("roi_heads.")
    if owner == "stem.conv1":
        return *prefix, "stem"
    if match := re.fullmatch(r"(res[2-5])\.(\d+)\.(conv[1-3]|shortcut)", owner):
        return *prefix, f"{match[1]}_{match[2]}", match[3]
    return None


def _numbered_path(owner: str) -> tuple[str, ...] | None:
    if match := re.fullmatch(r"(?:backbone\.)?(fpn_(?:lateral|output)\d)", owner):
        return "fpn", match[1]
    if match := re.fullmatch(r"roi_heads\.mask_head\.(mask_fcn\d)", owner):
        return "roi_heads", "mask_head", match[1]
    return None


def prepare(
    state: dict[str, np.ndarray], *, provenance: Provenance, num_classes: int | None
) -> dict[str, np.ndarray]:
    """Returns the state dict with the first convolution converted to read RGB."""
    del num_classes
    if provenance.channel_order == "rgb":
        return state
    return {
        name: value[:, ::-1] if BACKBONE_PREFIX.sub("", name) == "stem.conv1.weight" else value
        for name, value in state.items()
    }


def provenance(state: dict[str, np.ndarray], *, config: str) -> Provenance:
    """Returns detectron2's conventions.

    Mean and standard deviation of the pixels are read from the file if it has them, as older files do. The order of
    the channels then follows from the blue channel, whose mean is the lowest. Otherwise they are detectron2's
    defaults, for images in BGR and MSRA's ResNet, as in its whole zoo except the ImageNet files without a prefix.
    """
    del config
    if "stem.conv1.weight" in state:
        return Provenance(
            source="detectron2",
            pixel_mean=torchvision_names.PIXEL_MEAN,
            pixel_std=torchvision_names.PIXEL_STD,
            channel_order="rgb",
            stride_in_1x1=False,
        )
    mean, std, order = PIXEL_MEAN, PIXEL_STD, "bgr"
    if "pixel_mean" in state and "pixel_std" in state:
        mean, std = (tuple(state[name].ravel().tolist()) for name in ("pixel_mean", "pixel_std"))
        order = "bgr" if mean[0] < mean[-1] else "rgb"
        if order == "bgr":
            mean, std = mean[::-1], std[::-1]
    return Provenance(
        source="detectron2",
        pixel_mean=mean,
        pixel_std=std,
        channel_order=order,
        # The zoo divides by a standard deviation only if it starts from weights with the stride in the 3x3.
        stride_in_1x1=bool(np.allclose(std, 1.0)),
        box_coder=CenterBoxCoder((10.0, 10.0, 5.0, 5.0)),
        rpn_box_coder=CenterBoxCoder((1.0, 1.0, 1.0, 1.0)),
        anchor_offset=0.0,
        aligned_pooling=True,
    )
