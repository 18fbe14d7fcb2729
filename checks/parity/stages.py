"""Predictions beside torchvision's, stage by stage: each is fed what torchvision's previous stage made.

So an error shows in the stage that makes it, and no decision of an earlier one (a box more or less after NMS)
hides it. The last comparison runs both from the images to the detections.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from checks.parity.comparison import Comparison, largest
from checks.parity.inputs import padded, used
from klbox_jax.evaluation.eval_step import eval_step
from klbox_jax.models.convolution import Conv
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.models.normalization import FrozenBatchNorm
from klbox_jax.models.rpn import RPNOutputs
from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.postprocess.detect import detect
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch, BoxPredictions
from klbox_jax.weights import torchvision_names

# Share of torchvision's detections that may have no partner end to end: rounding tips a suppression over.
UNMATCHED = 0.02


def compare_backbone(
    model: GeneralizedRCNN, params: Any, batch: Batch, pyramid: dict, activations: dict
) -> Iterator[Comparison]:
    """Compares the output of every layer of the backbone and the pyramid, from the images on."""

    @jax.jit
    def run(params, batch):
        return model.apply(
            {"params": params},
            batch.images,
            batch.image_size,
            method="pyramid",
            capture_intermediates=lambda module, _: isinstance(module, (Conv, FrozenBatchNorm)),
            mutable="intermediates",
        )

    ours, state = run(params, batch)
    layers = flatten_dict(state["intermediates"])
    for name, theirs in activations.items():
        target = torchvision_names.translate(f"{name}.weight", pooled_side=7)
        (found,) = layers[(*target.path[:-1], "__call__")]
        yield largest("layers", name, found, theirs)
    for name, theirs in pyramid.items():
        yield largest("pyramid", name, ours[name], theirs)


def compare_rpn(
    model: GeneralizedRCNN, params: Any, batch: Batch, pyramid: dict, found: dict
) -> Iterator[Comparison]:
    """Compares the RPN's outputs of torchvision's pyramid, and the proposals of torchvision's outputs."""

    @jax.jit
    def run(params, pyramid):
        return model.apply(
            {"params": params},
            pyramid,
            method=lambda model, pyramid: model.rpn(pyramid, batch.images.shape[1:3]),
        )

    ours = run(params, pyramid)
    parts = {
        "rpn_logits": ours.objectness_logits,
        "rpn_deltas": ours.anchor_deltas,
        "anchors": ours.anchors,
    }
    for name, levels in parts.items():
        for level, (mine, theirs) in enumerate(zip(levels, found[name], strict=True), start=2):
            yield largest("rpn", f"{name} p{level}", mine, theirs)
    outputs = RPNOutputs(*(tuple(map(jnp.asarray, found[name])) for name in parts))
    proposals = jax.jit(
        lambda outputs: model.rpn.apply(
            {}, outputs, jnp.asarray(batch.image_size), train=False, method="predict_proposals"
        )
    )(outputs)
    for image, theirs in enumerate(found["proposals"]):
        mine = used(proposals.boxes[image], proposals.valid[image])
        yield largest("proposals", f"image {image}, {len(theirs)} boxes", mine, theirs)


def compare_heads(
    model: GeneralizedRCNN,
    params: Any,
    batch: Batch,
    pyramid: dict,
    found: dict,
    settings: PostprocessSettings,
) -> Iterator[Comparison]:
    """Compares pooling, box head, detections and masks, each fed with torchvision's."""
    proposals = padded(found["proposals"], max(map(len, found["proposals"])))

    @jax.jit
    def run(params, pyramid, boxes):
        pooled = jax.vmap(model.roi_heads.box_pooler)(pyramid, boxes)
        return pooled, model.apply(
            {"params": params},
            pyramid,
            boxes,
            method=lambda model, pyramid, boxes: model.roi_heads(pyramid, boxes),
        )

    pooled, predictions = run(params, pyramid, proposals.boxes)
    yield largest("roi_align", "pooled", used(pooled, proposals.valid), found["pooled"])
    logits, deltas = (
        used(predictions.class_logits, proposals.valid),
        used(predictions.box_deltas, proposals.valid),
    )
    theirs_logits = np.roll(found["class_logits"], -1, axis=1)
    theirs_deltas = found["box_deltas"].reshape(len(deltas), -1, 4)[:, 1:]
    yield largest("box head", "class_logits", logits, theirs_logits)
    yield largest("box head", "box_deltas", deltas, theirs_deltas)

    ends = np.cumsum([len(x) for x in found["proposals"]])[:-1]
    for image, (logits, deltas) in enumerate(
        zip(np.split(theirs_logits, ends), np.split(theirs_deltas, ends), strict=True)
    ):
        alone = padded(found["proposals"][image : image + 1], len(logits))
        detections = detect(
            BoxPredictions(class_logits=jnp.asarray(logits), box_deltas=jnp.asarray(deltas)),
            jax.tree.map(lambda x: x[0], alone),
            jnp.asarray(batch.image_size[image]),
            settings=settings,
            box_coder=model.roi_heads.box_coder,
        )
        for name, mine in (("boxes", detections.boxes), ("scores", detections.scores)):
            rows = used(mine, detections.valid)
            yield largest("detections", f"{name}, image {image}", rows, found[name][image])
        classes = used(detections.classes, detections.valid) + 1
        yield largest("detections", f"labels, image {image}", classes, found["labels"][image])

    if model.roi_heads.mask_head is None:
        return
    boxes = padded(found["boxes"], max(map(len, found["boxes"])))
    classes = np.stack([np.pad(x - 1, (0, boxes.valid.shape[1] - len(x))) for x in found["labels"]])
    masks = jax.jit(
        lambda params: model.apply(
            {"params": params}, pyramid, boxes.boxes, jnp.asarray(classes, jnp.int32), method="predict_masks"
        )
    )(params)
    theirs = 1 / (1 + np.exp(-np.concatenate(found["mask_logits"])))
    yield largest("masks", "mask probabilities", used(masks, boxes.valid), theirs)


def compare_end_to_end(
    model: GeneralizedRCNN, params: Any, batch: Batch, found: dict, settings: PostprocessSettings
) -> Iterator[Comparison]:
    """Compares the share of torchvision's detections that have one of ours beside them, from the images on."""
    run = jax.jit(lambda params, batch: eval_step(params, batch, model=model, settings={"all": settings}))
    ours = run(params, batch)["all"]
    for image, (boxes, scores, labels) in enumerate(
        zip(found["boxes"], found["scores"], found["labels"], strict=True)
    ):
        mine = jax.tree.map(lambda x, image=image: x[image][np.asarray(ours.valid[image])], ours)
        same = np.asarray(pairwise_iou(jnp.asarray(boxes), mine.boxes)) > 0.99
        same &= np.asarray(mine.classes)[None, :] + 1 == labels[:, None]
        same &= np.abs(np.asarray(mine.scores)[None, :] - scores[:, None]) < 1e-3
        missed = 1.0 - float(same.any(axis=1).mean())
        missed = max(missed, abs(len(mine.boxes) - len(boxes)) / len(boxes))
        yield Comparison(
            "end to end", f"image {image}, {len(boxes)} detections without partner", missed, UNMATCHED
        )
