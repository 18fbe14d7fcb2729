"""A Mask R-CNN of a few channels, and its tensors under every foreign layout.

The layouts are written here from our parameters, name by name: the inverse of what the package does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.models.box_head import BoxHead
from klbox_jax.models.box_predictor import BoxPredictor
from klbox_jax.models.fpn import FPN
from klbox_jax.models.mask_head import MaskHead
from klbox_jax.models.resnet import BottleneckResNet
from klbox_jax.models.rpn import RPNHead

BLOCKS = (1, 2, 1, 1)
CHANNELS = (8, 12, 16, 20)
# Bins along a side of the maps that `fc1` reads.
SIDE = 3
CLASSES = 3

NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@functools.cache
def _shapes(module, *inputs):
    """Shapes of a module's parameters; inputs are shapes, too, or pairs of a name and a shape."""
    inputs = [
        {name: jnp.zeros(shape) for name, shape in each} if isinstance(each[0], tuple) else jnp.zeros(each)
        for each in inputs
    ]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def fresh_params(*, num_classes=CLASSES, log_vars=False, blocks=BLOCKS):
    """Our parameters, every one of them -7."""
    stages = tuple((f"res{stage}", (1, 4, 4, channels)) for stage, channels in enumerate(CHANNELS, start=2))
    box_loss = BoxLoss(name="kl" if log_vars else "smooth_l1")
    predictor = BoxPredictor(num_classes=num_classes, box_loss=box_loss)
    net = BottleneckResNet(stage_blocks=blocks, stage_features=CHANNELS, stem_features=4)
    params = {
        "backbone": _shapes(net, (1, 32, 32, 3)),
        "fpn": _shapes(FPN(features=4), stages),
        "rpn": {"head": _shapes(RPNHead(features=4, num_anchors=2), (1, 4, 4, 4))},
        "roi_heads": {
            "box_head": _shapes(BoxHead(features=6), (1, SIDE, SIDE, 4)),
            "box_predictor": _shapes(predictor, (1, 6)),
            "mask_head": _shapes(MaskHead(num_classes, features=4, num_convs=2), (1, 4, 4, 4)),
        },
    }
    return jax.tree.map(lambda leaf: np.full(leaf.shape, -7.0, leaf.dtype), params)


def trained_params(**kwargs):
    """Our parameters with random values: what a file is written from, and has to come back."""
    rng = np.random.default_rng(0)
    fresh = fresh_params(**kwargs)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), fresh)


def to_oihw(kernel):
    return np.einsum("hwio->oihw", kernel)


def to_iohw(kernel):
    return np.einsum("hwio->iohw", kernel)


def to_rows(kernel):
    """Of a linear layer over an unpooled vector."""
    return np.einsum("io->oi", kernel)


def to_pooled_rows(kernel):
    """Of `fc1`: inputs in the order of channels, rows, columns."""
    rows = np.zeros((kernel.shape[1], kernel.shape[0]), np.float32)
    channels = kernel.shape[0] // SIDE**2
    for row in range(SIDE):
        for column in range(SIDE):
            for channel in range(channels):
                ours = (row * SIDE + column) * channels + channel
                theirs = (channel * SIDE + row) * SIDE + column
                rows[:, theirs] = kernel[ours]
    return rows


def with_background(value, rows):
    """Class outputs with `rows` outputs of the background in front."""
    return np.concatenate([np.full((rows, *value.shape[1:]), 99.0, np.float32), value])


def background_first(value):
    return np.concatenate([value[-1:], value[:-1]])


def blocks_of(stage):
    return range(BLOCKS[stage - 2])


def torchvision_state(params, *, old_names=False):
    """The state dict of torchvision's Mask R-CNN."""
    flat = {"/".join(path): np.asarray(value) for path, value in flatten_dict(params).items()}
    state = {}

    def conv(theirs, ours, turn=to_oihw):
        state[f"{theirs}.weight"] = turn(flat[f"{ours}/kernel"])
        if f"{ours}/bias" in flat:
            state[f"{theirs}.bias"] = flat[f"{ours}/bias"]

    def norm(theirs, ours):
        for our_leaf, their_leaf in NORM.items():
            state[f"{theirs}.{their_leaf}"] = flat[f"{ours}/{our_leaf}"]
        if not old_names:
            state[f"{theirs}.num_batches_tracked"] = np.asarray(3)

    conv("backbone.body.conv1", "backbone/stem")
    norm("backbone.body.bn1", "backbone/stem_norm")
    for stage in (2, 3, 4, 5):
        for block in blocks_of(stage):
            theirs, ours = f"backbone.body.layer{stage - 1}.{block}", f"backbone/res{stage}_{block}"
            for number in (1, 2, 3):
                conv(f"{theirs}.conv{number}", f"{ours}/conv{number}")
                norm(f"{theirs}.bn{number}", f"{ours}/norm{number}")
            if block == 0:
                conv(f"{theirs}.downsample.0", f"{ours}/shortcut")
                norm(f"{theirs}.downsample.1", f"{ours}/shortcut_norm")
        suffix = "" if old_names else ".0"
        conv(f"backbone.fpn.inner_blocks.{stage - 2}{suffix}", f"fpn/fpn_lateral{stage}")
        conv(f"backbone.fpn.layer_blocks.{stage - 2}{suffix}", f"fpn/fpn_output{stage}")
    conv("rpn.head.conv" if old_names else "rpn.head.conv.0.0", "rpn/head/conv")
    conv("rpn.head.cls_logits", "rpn/head/objectness_logits")
    conv("rpn.head.bbox_pred", "rpn/head/anchor_deltas")
    conv("roi_heads.box_head.fc6", "roi_heads/box_head/fc1", to_pooled_rows)
    conv("roi_heads.box_head.fc7", "roi_heads/box_head/fc2", to_rows)
    for name in ("cls_score", "bbox_pred"):
        conv(f"roi_heads.box_predictor.{name}", f"roi_heads/box_predictor/{name}", to_rows)
    for number in (1, 2):
        theirs = f"mask_fcn{number}" if old_names else f"{number - 1}.0"
        conv(f"roi_heads.mask_head.{theirs}", f"roi_heads/mask_head/mask_fcn{number}")
    conv("roi_heads.mask_predictor.conv5_mask", "roi_heads/mask_head/conv5_mask", to_iohw)
    conv("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads/mask_head/mask_fcn_logits")
    for name in state:
        if "cls_score" in name:
            state[name] = background_first(state[name])
        if "box_predictor.bbox_pred" in name:
            state[name] = with_background(state[name], 4)
        if "mask_fcn_logits" in name:
            state[name] = with_background(state[name], 1)
    return state


def detectron2_state(params, *, bgr=True):
    """The state dict of detectron2's Mask R-CNN."""
    flat = {"/".join(path): np.asarray(value) for path, value in flatten_dict(params).items()}
    state = {}

    def conv(theirs, ours, turn=to_oihw):
        state[f"{theirs}.weight"] = turn(flat[f"{ours}/kernel"])
        if f"{ours}/bias" in flat:
            state[f"{theirs}.bias"] = flat[f"{ours}/bias"]

    def normed(theirs, ours, our_norm):
        conv(theirs, ours)
        for our_leaf, their_leaf in NORM.items():
            state[f"{theirs}.norm.{their_leaf}"] = flat[f"{our_norm}/{our_leaf}"]

    normed("backbone.bottom_up.stem.conv1", "backbone/stem", "backbone/stem_norm")
    if bgr:
        state["backbone.bottom_up.stem.conv1.weight"] = state["backbone.bottom_up.stem.conv1.weight"][
            :, [2, 1, 0]
        ]
    for stage in (2, 3, 4, 5):
        for block in blocks_of(stage):
            theirs, ours = f"backbone.bottom_up.res{stage}.{block}", f"backbone/res{stage}_{block}"
            for number in (1, 2, 3):
                normed(f"{theirs}.conv{number}", f"{ours}/conv{number}", f"{ours}/norm{number}")
            if block == 0:
                normed(f"{theirs}.shortcut", f"{ours}/shortcut", f"{ours}/shortcut_norm")
        for kind in ("lateral", "output"):
            conv(f"backbone.fpn_{kind}{stage}", f"fpn/fpn_{kind}{stage}")
    for name in ("conv", "objectness_logits", "anchor_deltas"):
        conv(f"proposal_generator.rpn_head.{name}", f"rpn/head/{name}")
    conv("roi_heads.box_head.fc1", "roi_heads/box_head/fc1", to_pooled_rows)
    conv("roi_heads.box_head.fc2", "roi_heads/box_head/fc2", to_rows)
    for name in ("cls_score", "bbox_pred"):
        conv(f"roi_heads.box_predictor.{name}", f"roi_heads/box_predictor/{name}", to_rows)
    for number in (1, 2):
        conv(f"roi_heads.mask_head.mask_fcn{number}", f"roi_heads/mask_head/mask_fcn{number}")
    conv("roi_heads.mask_head.deconv", "roi_heads/mask_head/conv5_mask", to_iohw)
    conv("roi_heads.mask_head.predictor", "roi_heads/mask_head/mask_fcn_logits")
    return state


def detectron_blobs(params, *, kl=False):
    """Detectron's blobs of Mask R-CNN; norms with mean 0 and variance 1. With `kl` those of KL-Loss."""
    flat = {"/".join(path): np.asarray(value) for path, value in flatten_dict(params).items()}
    blobs = {}

    def conv(theirs, ours, turn=to_oihw):
        blobs[f"{theirs}_w"] = turn(flat[f"{ours}/kernel"])
        if f"{ours}/bias" in flat:
            blobs[f"{theirs}_b"] = flat[f"{ours}/bias"]

    def norm(theirs, ours):
        blobs[f"{theirs}_bn_s"] = flat[f"{ours}/scale"]
        blobs[f"{theirs}_bn_b"] = flat[f"{ours}/bias"]

    conv("conv1", "backbone/stem")
    blobs["conv1_w"] = blobs["conv1_w"][:, [2, 1, 0]]
    blobs["conv1_b"] = np.full(4, 1e-9, np.float32)
    norm("res_conv1", "backbone/stem_norm")
    for stage in (2, 3, 4, 5):
        for block in blocks_of(stage):
            theirs, ours = f"res{stage}_{block}_branch", f"backbone/res{stage}_{block}"
            for number, letter in enumerate("abc", start=1):
                conv(f"{theirs}2{letter}", f"{ours}/conv{number}")
                norm(f"{theirs}2{letter}", f"{ours}/norm{number}")
            if block == 0:
                conv(f"{theirs}1", f"{ours}/shortcut")
                norm(f"{theirs}1", f"{ours}/shortcut_norm")
        last = f"res{stage}_{BLOCKS[stage - 2] - 1}_sum"
        # The coarsest lateral layer starts the way down, and is named without it.
        conv(f"fpn_inner_{last}" + ("" if stage == 5 else "_lateral"), f"fpn/fpn_lateral{stage}")
        conv(f"fpn_{last}", f"fpn/fpn_output{stage}")
    conv("conv_rpn_fpn2", "rpn/head/conv")
    conv("rpn_cls_logits_fpn2", "rpn/head/objectness_logits")
    conv("rpn_bbox_pred_fpn2", "rpn/head/anchor_deltas")
    conv("fc6", "roi_heads/box_head/fc1", to_pooled_rows)
    conv("fc7", "roi_heads/box_head/fc2", to_rows)
    conv("cls_score", "roi_heads/box_predictor/cls_score", to_rows)
    conv("bbox_pred", "roi_heads/box_predictor/bbox_pred", to_rows)
    if kl:
        conv("bbox_pred_std", "roi_heads/box_predictor/bbox_log_var", to_rows)
    for number in (1, 2):
        conv(f"_[mask]_fcn{number}", f"roi_heads/mask_head/mask_fcn{number}")
    conv("conv5_mask", "roi_heads/mask_head/conv5_mask", to_iohw)
    conv("mask_fcn_logits", "roi_heads/mask_head/mask_fcn_logits")
    for name in list(blobs):
        if name.startswith("cls_score"):
            blobs[name] = background_first(blobs[name])
        if name.startswith("mask_fcn_logits"):
            blobs[name] = with_background(blobs[name], 1)
        if kl and name.startswith(("bbox_pred", "rpn_bbox_pred")):
            blobs[name] = in_order_x1_x2_y1_y2(blobs[name])
        if name.startswith("bbox_pred"):
            blobs[name] = with_background(blobs[name], 4)
        blobs[f"{name}_momentum"] = np.zeros_like(blobs[name])
    return blobs


def in_order_x1_x2_y1_y2(value):
    rows = np.array(value)
    for start in range(0, len(rows), 4):
        x1, y1, x2, y2 = value[start : start + 4]
        rows[start : start + 4] = x1, x2, y1, y2
    return rows
