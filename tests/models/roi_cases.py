"""RoI heads, their inputs and proposals for the tests of several files."""

import jax.numpy as jnp
import numpy as np

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.models.box_head import BoxHead
from klbox_jax.models.box_predictor import BoxPredictor
from klbox_jax.models.roi_heads import RoIHeads
from klbox_jax.ops.roi_pooler import RoIPooler
from klbox_jax.structures import Proposals

K = 3


def proposals_of(boxes, valid=None):
    boxes = np.asarray(boxes, np.float32)
    return Proposals(
        boxes=boxes,
        objectness_logits=np.zeros(len(boxes), np.float32),
        valid=np.ones(len(boxes), bool) if valid is None else np.asarray(valid),
    )


def predictor_of(box_loss="kl", **fields):
    box_loss = box_loss if isinstance(box_loss, BoxLoss) else BoxLoss(name=box_loss)
    return BoxPredictor(num_classes=K, box_loss=box_loss, **fields)


def heads_of(box_loss="kl", *, class_agnostic=False, **fields):
    arguments = {"box_pooler": RoIPooler(levels=(3, 4), resolution=3), "box_head": BoxHead(16)}
    box_predictor = predictor_of(box_loss, class_agnostic=class_agnostic)
    return RoIHeads(box_predictor=box_predictor, **(arguments | fields))


def pyramid_and_boxes():
    rng = np.random.default_rng(0)
    pyramid = {
        "p3": jnp.asarray(rng.normal(size=(2, 12, 10, 4)), jnp.float32),
        "p4": jnp.asarray(rng.normal(size=(2, 6, 5, 4)), jnp.float32),
    }
    corners = rng.uniform(0, 40, (2, 5, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 40, (2, 5, 2))], axis=2)
    return pyramid, jnp.asarray(boxes, jnp.float32)
