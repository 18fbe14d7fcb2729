"""Compares a training step with torchvision's: the sampled RoIs, the losses and every gradient."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from checks.parity import peer
from checks.parity.comparison import Comparison, gradient, largest
from checks.parity.inputs import Ours, padded, read, used
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.ops.masks import crop_and_resize_masks
from klbox_jax.ops.matcher import Label
from klbox_jax.ops.sampling import subsample_labels
from klbox_jax.structures import Batch, Proposals

LOSS_NAMES = {
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
}


def training_losses(model: GeneralizedRCNN, batch: Batch, proposals: Proposals, rpn_keys, roi_keys):
    """Returns the losses and samples of `GeneralizedRCNN.train_forward`, for given proposals."""
    pyramid = model.pyramid(batch.images, batch.image_size)
    outputs = model.rpn(pyramid, batch.images.shape[1:3])
    losses = model.rpn.losses(outputs, batch.gt, batch.valid, rpn_keys)
    samples = model.roi_heads.sample(proposals, batch.gt, batch.valid, roi_keys)
    heads = model.roi_heads
    losses |= heads.box_predictor.losses(heads(pyramid, samples.boxes), samples).losses
    if heads.mask_head is not None:
        losses |= heads.mask_head.losses(pyramid, heads.foreground_slots(samples), batch.gt).losses
    return losses, samples


def compare_training(ours: Ours, theirs: Any, images: Any, folder: pathlib.Path) -> Iterator[Comparison]:
    """Compares the sampled RoIs, the losses and the gradient of every parameter; both use our sampler."""
    model, batch = ours.model, ours.batch
    slots = model.rpn.train_proposals.post_nms_topk
    rpn_keys, roi_keys = jax.random.split(jax.random.key(0), (2, 2))

    def draw(key, labels, sampling):
        labels = jnp.asarray(np.where(labels >= 1, Label.POSITIVE, labels).astype(np.int32))
        samples = subsample_labels(
            key,
            labels,
            num_samples=sampling.batch_size_per_image,
            positive_fraction=sampling.positive_fraction,
        )
        taken = np.zeros(len(labels), bool)
        taken[used(samples.indices, samples.valid)] = True
        return taken

    def draw_rois(image, labels):
        # Ours pads the proposals, and the objects after them: the same boxes are in the same rows.
        objects = int(batch.gt.valid[image].sum())
        rows = np.concatenate([np.arange(len(labels) - objects), slots + np.arange(objects)])
        all_labels = np.full(slots + batch.gt.valid.shape[1], Label.IGNORE)
        all_labels[rows] = labels
        return draw(roi_keys[image], all_labels, model.roi_heads.sampling)[rows]

    def mask_targets(image, boxes, index):
        arguments = (batch.gt.masks[image], batch.gt.boxes[image], boxes, index)
        return np.array(crop_and_resize_masks(*map(jnp.asarray, arguments), output_size=28))

    targets = [
        {
            "boxes": batch.gt.boxes[i][valid],
            "labels": batch.gt.classes[i][valid].astype(np.int64) + 1,
            "masks": np.zeros((valid.sum(), 1, 1), np.uint8),
        }
        for i, valid in enumerate(batch.gt.valid)
    ]
    found = peer.train(
        theirs,
        images,
        targets,
        draw_anchors=lambda image, labels: draw(rpn_keys[image], labels, model.rpn.sampling),
        draw_rois=draw_rois,
        mask_targets=mask_targets,
    )

    def total(params, proposals):
        losses, samples = model.apply(
            {"params": params}, batch, proposals, rpn_keys, roi_keys, method=training_losses
        )
        return sum(losses.values()), (losses, samples)

    gradient_of = jax.jit(jax.grad(total, has_aux=True))
    gradients, (losses, samples) = gradient_of(ours.params, padded(found["proposals"], slots))
    for image, rows in enumerate(found["samples"]):
        mine = used(samples.boxes[image], samples.valid[image])
        order = [x[np.lexsort(x.T)] for x in (mine, rows)]
        yield largest("samples", f"RoIs, image {image}", *order)
    for name, value in losses.items():
        yield largest("losses", name, value, found["losses"][LOSS_NAMES[name]])
    peer.save_gradients(theirs, folder / "gradients.pth")
    their_gradients, _ = read(ours.params, folder / "gradients.pth", model)
    their_gradients = flatten_dict(their_gradients)
    for path, mine in flatten_dict(gradients).items():
        if "norm" not in path[-2]:
            yield gradient("/".join(path), mine, their_gradients[path])
