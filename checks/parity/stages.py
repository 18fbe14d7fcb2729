"""Compares predictions with torchvision's, stage by stage: each stage gets torchvision's outputs of the stage before.

So an error shows in the stage that makes it, and no decision of an earlier one (a box more or less after NMS) hides
it. The last comparison runs both from the images to the detections.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from checks.parity.comparison import Comparison, largest
from checks.parity.inputs import Ours, padded, used
from klbox_jax.evaluation.eval_step import eval_step
from klbox_jax.models.convolution import Conv
from klbox_jax.models.normalization import FrozenBatchNorm
from klbox_jax.models.rpn import RPNOutputs
from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.postprocess.detect import detect
from klbox_jax.structures import BoxPredictions
from klbox_jax.weights import torchvision_names

# Share of torchvision's detections that may have no partner end to end: rounding can change a suppression.
UNMATCHED = 0.02


def compare_backbone(ours: Ours, pyramid: dict, activations: dict) -> Iterator[Comparison]:
    """Compares the output of every layer of the backbone and the pyramid, from the images on."""
    found, state = ours.apply(
        ours.batch.images,
        ours.batch.image_size,
        method="pyramid",
        capture_intermediates=lambda module, _: isinstance(module, (Conv, FrozenBatchNorm)),
        mutable="intermediates",
    )
    layers = flatten_dict(state["intermediates"])
    for name, theirs in activations.items():
        target = torchvision_names.translate(f"{name}.weight", pooled_side=7)
        (mine,) = layers[(*target.path[:-1], "__call__")]
        yield largest("layers", name, mine, theirs)
    for name, theirs in pyramid.items():
        yield largest("pyramid", name, found[name], theirs)


def compare_rpn(ours: Ours, pyramid: dict, found: dict) -> Iterator[Comparison]:
    """Compares the RPN's outputs of torchvision's pyramid, and the proposals of torchvision's outputs."""
    canvas = ours.batch.images.shape[1:3]
    outputs = ours.apply(pyramid, method=lambda model, pyramid: model.rpn(pyramid, canvas))
    parts = {
        "rpn_logits": outputs.objectness_logits,
        "rpn_deltas": outputs.anchor_deltas,
        "anchors": outputs.anchors,
    }
    for name, levels in parts.items():
        for level, (mine, theirs) in enumerate(zip(levels, found[name], strict=True), start=2):
            yield largest("rpn", f"{name} p{level}", mine, theirs)
    theirs = RPNOutputs(*(tuple(map(jnp.asarray, found[name])) for name in parts))
    sizes = jnp.asarray(ours.batch.image_size)
    proposals = jax.jit(
        lambda outputs: ours.model.rpn.apply({}, outputs, sizes, train=False, method="predict_proposals")
    )(theirs)
    for image, theirs in enumerate(found["proposals"]):
        mine = used(proposals.boxes[image], proposals.valid[image])
        yield largest("proposals", f"image {image}, {len(theirs)} boxes", mine, theirs)


def compare_heads(ours: Ours, pyramid: dict, found: dict) -> Iterator[Comparison]:
    """Compares pooling, box head, detections and masks, each with torchvision's inputs."""
    heads = ours.model.roi_heads
    proposals = padded(found["proposals"], max(map(len, found["proposals"])))
    pooled = jax.jit(jax.vmap(heads.box_pooler))(pyramid, proposals.boxes)
    yield largest("roi_align", "pooled", used(pooled, proposals.valid), found["pooled"])
    predictions = ours.apply(pyramid, proposals.boxes, method=lambda model, *args: model.roi_heads(*args))
    logits, deltas = (
        used(values, proposals.valid) for values in (predictions.class_logits, predictions.box_deltas)
    )
    theirs_logits = np.roll(found["class_logits"], -1, axis=1)
    theirs_deltas = found["box_deltas"].reshape(len(deltas), -1, 4)[:, 1:]
    yield largest("box head", "class_logits", logits, theirs_logits)
    yield largest("box head", "box_deltas", deltas, theirs_deltas)

    ends = np.cumsum([len(x) for x in found["proposals"]])[:-1]
    by_image = zip(np.split(theirs_logits, ends), np.split(theirs_deltas, ends), strict=True)
    for image, (logits, deltas) in enumerate(by_image):
        alone = padded(found["proposals"][image : image + 1], len(logits))
        detections = detect(
            BoxPredictions(class_logits=jnp.asarray(logits), box_deltas=jnp.asarray(deltas)),
            jax.tree.map(lambda x: x[0], alone),
            jnp.asarray(ours.batch.image_size[image]),
            settings=ours.settings,
            box_coder=heads.box_coder,
        )
        results = {"boxes": detections.boxes, "scores": detections.scores, "labels": detections.classes + 1}
        for name, mine in results.items():
            rows = used(mine, detections.valid)
            yield largest("detections", f"{name}, image {image}", rows, found[name][image])
    if heads.mask_head is not None:
        yield _compare_masks(ours, pyramid, found)


def _compare_masks(ours: Ours, pyramid: dict, found: dict) -> Comparison:
    boxes = padded(found["boxes"], max(map(len, found["boxes"])))
    slots = boxes.valid.shape[1]
    classes = np.stack([np.pad(x - 1, (0, slots - len(x))) for x in found["labels"]]).astype(np.int32)
    masks = ours.apply(pyramid, boxes.boxes, jnp.asarray(classes), method="predict_masks")
    theirs = 1 / (1 + np.exp(-np.concatenate(found["mask_logits"])))
    return largest("masks", "mask probabilities", used(masks, boxes.valid), theirs)


def compare_end_to_end(ours: Ours, found: dict) -> Iterator[Comparison]:
    """Compares the share of torchvision's detections that have one of ours near them, from the images on."""
    settings = {"all": ours.settings}
    run = jax.jit(lambda params, batch: eval_step(params, batch, model=ours.model, settings=settings))
    results = run(ours.params, ours.batch)["all"]
    by_image = zip(found["boxes"], found["scores"], found["labels"], strict=True)
    for image, (boxes, scores, labels) in enumerate(by_image):
        mine = jax.tree.map(lambda x, image=image: x[image][np.asarray(results.valid[image])], results)
        same = np.asarray(pairwise_iou(jnp.asarray(boxes), mine.boxes)) > 0.99
        same &= np.asarray(mine.classes)[None, :] + 1 == labels[:, None]
        same &= np.abs(np.asarray(mine.scores)[None, :] - scores[:, None]) < 1e-3
        missed = max(1.0 - float(same.any(axis=1).mean()), abs(len(mine.boxes) - len(boxes)) / len(boxes))
        name = f"image {image}, {len(boxes)} detections without partner"
        yield Comparison("end to end", name, missed, UNMATCHED)
