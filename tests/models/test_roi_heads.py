import jax
import numpy as np
import pytest

from klbox_jax.models.box_head import BoxHead
from klbox_jax.models.resnet import Res5Head
from klbox_jax.models.roi_heads import RoISampling
from klbox_jax.models.vgg import VGGBoxHead
from klbox_jax.structures import BoxPredictions
from tests.cases import ground_truth
from tests.models.roi_cases import K, heads_of, proposals_of, pyramid_and_boxes
from tests.thin import num_params


def is_predictions(x):
    return isinstance(x, BoxPredictions)


@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize("box_loss", ["smooth_l1", "kl"])
def test_shapes_and_parameters(box_loss, class_agnostic):
    heads = heads_of(box_loss, class_agnostic=class_agnostic)
    pyramid, boxes = pyramid_and_boxes()
    leaves, variables = jax.eval_shape(
        lambda: jax.tree.map(
            jax.tree.leaves, heads.init_with_output(jax.random.key(0), pyramid, boxes), is_leaf=is_predictions
        )
    )
    num_boxes = 1 if class_agnostic else K
    branches = 1 if box_loss == "smooth_l1" else 2
    # Logits, deltas and, with a probabilistic loss, log variances.
    assert [leaf.shape for leaf in leaves] == [(2, 5, K + 1)] + branches * [(2, 5, num_boxes, 4)]
    # 3 x 3 bins of 4 channels to 16, 16 to 16; classes with the background; 4 numbers a box and branch.
    assert num_params(variables) == (
        (36 * 16 + 16)
        + (16 * 16 + 16)
        + (16 * (K + 1) + K + 1)
        + branches * (16 * 4 * num_boxes + 4 * num_boxes)
    )


def test_rois_of_an_image_that_only_fills_the_batch_are_not_valid():
    proposals = jax.tree.map(lambda x: np.stack([x, x]), proposals_of([[0, 0, 10, 10], [50, 50, 60, 60]]))
    gt = jax.tree.map(lambda x: np.stack([x, x]), ground_truth([[0, 0, 10, 10]], [1]))
    keys = jax.random.split(jax.random.key(0), 2)
    heads = heads_of(sampling=RoISampling(batch_size_per_image=4))
    samples = jax.jit(lambda *a: heads.apply({}, *a, method="sample"))(
        proposals, gt, np.array([True, False]), keys
    )
    assert samples.valid.any(axis=1).tolist() == [True, False]


@pytest.mark.parametrize("head", [BoxHead(16), VGGBoxHead((16, 16)), Res5Head(blocks=1, features=16)])
def test_training_draws_the_dropout_of_a_head_that_has_one(head):
    heads = heads_of(box_head=head)
    pyramid, boxes = pyramid_and_boxes()
    variables = jax.jit(heads.init)(jax.random.key(0), pyramid, boxes)
    predict = jax.jit(lambda key: heads.apply(variables, pyramid, boxes, key).class_logits)
    plain, same, other = predict(None), predict(jax.random.key(1)), predict(jax.random.key(2))
    has_dropout = isinstance(head, VGGBoxHead)
    assert bool((plain != same).any()) == bool((same != other).any()) == has_dropout


def test_the_foreground_slots_hold_all_foreground():
    gt = ground_truth([[[0, 0, 10, 10]] * 3], [[1, 1, 1]])
    proposals = jax.tree.map(lambda x: x[None], proposals_of([[0, 0, 10, 9], [50, 50, 60, 60]]))
    heads = heads_of(sampling=RoISampling(batch_size_per_image=6, positive_fraction=0.4))
    keys = jax.random.split(jax.random.key(0), 1)
    samples = jax.jit(lambda *a: heads.apply({}, *a, method="sample"))(proposals, gt, np.array([True]), keys)
    # floor(6 * 0.4) = 2 of the four candidates.
    assert samples.is_foreground.tolist() == [[True, True, False, False, False, False]]
    assert heads.foreground_slots(samples).is_foreground.tolist() == [[True, True]]
