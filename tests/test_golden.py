"""Compares results with torchvision's in tests/golden, which `python tests/golden/make.py` writes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.evaluation.masks import paste_mask
from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.losses.mask import mask_loss
from klbox_jax.models.box_predictor import BoxPredictor
from klbox_jax.models.rpn import RPN, AnchorSampling, ProposalSettings, RPNOutputs, generate_proposals
from klbox_jax.ops.anchors import AnchorGenerator
from klbox_jax.ops.box_coder import CenterBoxCoder
from klbox_jax.ops.matcher import match_boxes
from klbox_jax.ops.nms import hard_nms
from klbox_jax.ops.roi_pooler import RoIPooler
from klbox_jax.ops.roi_pooling import roi_align
from klbox_jax.postprocess.detect import detect
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import BoxPredictions, Proposals, RoISamples
from tests.cases import ground_truth

FOLDER = pathlib.Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.npz"))
BOX_HEAD = CenterBoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
ANCHORS = CenterBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


def golden(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return {key: value if value.dtype.kind == "U" else jnp.asarray(value) for key, value in arrays.items()}


def channels_last(value):
    return jnp.moveaxis(value, -3, -1)


def close(ours, theirs, *, rtol=1e-4):
    """Within a share of the largest value."""
    assert np.shape(ours) == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


def test_the_files_are_small_and_say_where_they_come_from():
    assert len(FILES) == 10
    for path in FILES:
        assert path.stat().st_size < 200_000
        assert "torchvision 0." in str(golden(path.stem)["versions"])
        assert golden(path.stem)["seed"] == 20


def test_anchors():
    generator = AnchorGenerator(
        sizes=((32.0,), (64.0,), (128.0,)),
        aspect_ratios=(0.5, 1.0, 2.0),
        strides=(8, 16, 32),
        offset=0.0,
        round_sizes=True,
    )
    np.testing.assert_array_equal(np.concatenate(generator.grid((64, 96))), golden("anchors")["anchors"])


@pytest.mark.parametrize(("name", "coder"), [("box_head", BOX_HEAD), ("rpn", ANCHORS)])
def test_box_coder(name, coder):
    theirs = golden("box_coder")
    close(coder.encode(theirs["boxes"], theirs["references"]), theirs[f"{name}_encoded"], rtol=1e-5)
    close(coder.decode(theirs["deltas"], theirs["references"]), theirs[f"{name}_decoded"], rtol=1e-5)


@pytest.mark.parametrize(("name", "aligned"), [("aligned", True), ("not_aligned", False)])
def test_roi_align(name, aligned):
    theirs = golden("pooling")
    ours = jax.jit(
        lambda features, boxes: roi_align(
            features, boxes, output_size=7, sampling_ratio=2, spatial_scale=0.25, aligned=aligned
        )
    )(channels_last(theirs["features"]), theirs["boxes"])
    close(ours, channels_last(theirs[name]))


def test_pooling_from_the_pyramid():
    theirs = golden("pooling")
    pyramid = {f"p{level}": channels_last(theirs[f"level{level - 2}"]) for level in (2, 3, 4, 5)}
    ours = jax.jit(RoIPooler(aligned=False))(pyramid, theirs["pyramid_boxes"])
    close(ours, channels_last(theirs["from_pyramid"]))


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_nms(threshold):
    theirs = golden("suppression")
    valid = jnp.ones(len(theirs["boxes"]), bool)
    for name, classes in (("kept", None), ("kept_by_class", theirs["classes"])):
        ours = hard_nms(theirs["boxes"], theirs["scores"], valid, iou_threshold=threshold, classes=classes)
        np.testing.assert_array_equal(ours.indices[ours.valid], theirs[f"{name}_{threshold}"])


@pytest.mark.parametrize(("name", "min_size"), [("any", 1e-3), ("large", 16.0)])
def test_proposals(name, min_size):
    theirs = golden("proposals")
    ends = np.cumsum(np.asarray(theirs["counts"]))[:-1]
    levels = [tuple(jnp.split(theirs[part], ends)) for part in ("logits", "deltas", "anchors")]
    settings = ProposalSettings(pre_nms_topk=40, post_nms_topk=25, nms_threshold=0.7, min_size=min_size)
    ours = jax.jit(
        lambda *levels: generate_proposals(
            *levels, jnp.array([60, 72], jnp.int32), box_coder=ANCHORS, settings=settings
        )
    )(*levels)
    close(ours.boxes[ours.valid], theirs[f"{name}_boxes"], rtol=1e-5)
    close(jax.nn.sigmoid(ours.objectness_logits[ours.valid]), theirs[f"{name}_scores"], rtol=1e-5)


def test_rpn_labels_losses_and_gradients():
    theirs = golden("rpn_losses")
    anchors, gt = theirs["anchors"], jax.tree.map(jnp.asarray, ground_truth(theirs["gt_boxes"]))
    match = match_boxes(anchors, gt, thresholds=(0.3, 0.7), allow_low_quality_matches=True)
    np.testing.assert_array_equal(match.labels, theirs["labels"])
    assert sorted({int(label) for label in theirs["labels"]}) == [-1, 0, 1]

    rpn = RPN(
        features=8,
        levels=(3,),
        anchor_generator=AnchorGenerator(sizes=((16.0,),), strides=(8,)),
        sampling=AnchorSampling(batch_size_per_image=int(theirs["num_samples"])),
        smooth_l1_beta=1 / 9,
    )

    def total(logits, deltas):
        outputs = RPNOutputs((logits[None],), (deltas[None],), (anchors,))
        batched = jax.tree.map(lambda x: x[None], gt)
        keys = jax.random.split(jax.random.key(0), 1)
        losses = rpn.apply({}, outputs, batched, jnp.array([True]), keys, method="losses")
        return losses["loss_rpn_cls"] + 2 * losses["loss_rpn_loc"], losses

    gradients, losses = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
        theirs["logits"], theirs["deltas"]
    )
    for name, value in losses.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5)
    close(gradients[0], theirs["logits_gradient"])
    close(gradients[1], theirs["deltas_gradient"])


def test_losses_and_gradients_of_the_box_head():
    theirs = golden("box_losses")
    predictor = BoxPredictor(
        num_classes=3, box_loss=BoxLoss(name="smooth_l1", smooth_l1_beta=1 / 9), box_coder=BOX_HEAD
    )
    labels = theirs["labels"]
    samples = RoISamples(
        boxes=theirs["boxes"],
        gt_index=jnp.arange(len(labels)),
        gt_boxes=theirs["gt_boxes"],
        gt_classes=jnp.where(labels > 0, labels - 1, 3),
        is_foreground=labels > 0,
        valid=jnp.ones(len(labels), bool),
    )
    samples = jax.tree.map(lambda x: x[None], samples)

    def total(logits, deltas):
        predictions = BoxPredictions(
            class_logits=jnp.roll(logits, -1, axis=1)[None], box_deltas=deltas.reshape(1, -1, 4, 4)[:, :, 1:]
        )
        losses = predictor.apply({}, predictions, samples, method="losses").losses
        return losses["loss_cls"] + 2 * losses["loss_box_reg"], losses

    gradients, losses = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
        theirs["logits"], theirs["deltas"]
    )
    for name, value in losses.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5)
    close(gradients[0], theirs["logits_gradient"])
    close(gradients[1], theirs["deltas_gradient"])


def test_mask_loss_and_gradient():
    theirs = golden("mask_losses")
    classes = theirs["labels"] - 1

    def loss(logits):
        # The first row is the background's.
        return mask_loss(logits[:, 1:], classes, theirs["targets"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(theirs["logits"])
    np.testing.assert_allclose(value, theirs["loss_mask"], rtol=1e-5)
    close(gradient, theirs["logits_gradient"])


def test_detections():
    theirs = golden("detections")
    number = len(theirs["proposals"])
    found = jax.jit(
        lambda logits, deltas, boxes: detect(
            BoxPredictions(class_logits=logits, box_deltas=deltas),
            Proposals(boxes=boxes, objectness_logits=jnp.zeros(number), valid=jnp.ones(number, bool)),
            jnp.array([60, 72], jnp.int32),
            settings=PostprocessSettings(pre_nms_topk=160, detections_per_image=30),
            box_coder=BOX_HEAD,
        )
    )(jnp.roll(theirs["logits"], -1, axis=1), theirs["deltas"].reshape(-1, 5, 4)[:, 1:], theirs["proposals"])
    close(found.scores[found.valid], theirs["scores"], rtol=1e-5)
    close(found.boxes[found.valid], theirs["boxes"], rtol=1e-5)
    np.testing.assert_array_equal(found.classes[found.valid] + 1, theirs["labels"])


def test_pasting_on_the_pixels_that_torchvision_draws_on():
    theirs = golden("pasting")
    for mask, box, pasted in zip(theirs["masks"], theirs["boxes"], theirs["pasted"], strict=True):
        # With a border of one cell the 8 cells are 10; torchvision draws these on one pixel more than they have.
        centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
        start, length = centre - half * 10 / 8, half * 2 * 10 / 8 + 1
        drawn = jnp.concatenate([start + length / 10, start + length * 9 / 10])
        height, width = pasted.shape
        ours = paste_mask(mask, drawn, height=height, width=width)
        np.testing.assert_array_equal(ours, pasted >= 0.5)
        assert 0 < ours.sum() < ours.size
