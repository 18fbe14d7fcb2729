import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.models.rpn import (
    RPN,
    AnchorSampling,
    ProposalSettings,
    RPNHead,
    RPNOutputs,
    generate_proposals,
)
from klbox_jax.ops.anchors import AnchorGenerator
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from tests.cases import ground_truth
from tests.references.matcher import match
from tests.references.nms import greedy_nms
from tests.thin import num_params, thin_model

CODER = CenterBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
CORNERS = CornerBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


def decoded(delta, anchor):
    """Girshick et al. 2014, appendix C."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2 + delta[0] * width, anchor[1] + height / 2 + delta[1] * height
    width, height = width * np.exp(delta[2]), height * np.exp(delta[3])
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def decoded_corners(delta, anchor):
    """He et al. 2019, section 3.1."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    return anchor + delta * np.array([width, height, width, height])


def encoded(box, anchor):
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    return np.array(
        [
            ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / width,
            ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / height,
            np.log((box[2] - box[0]) / width),
            np.log((box[3] - box[1]) / height),
        ]
    )


def random_anchors(rng, count):
    corners = rng.uniform(-10, 60, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(8, 40, (count, 2))], axis=1).astype(np.float32)


def proposals_by_loops(
    logits, deltas, anchors, image_size, *, pre_nms_topk, post_nms_topk, nms_threshold, decoded, min_size
):
    found = []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        order = np.argsort(-level_logits, kind="stable")[:pre_nms_topk]
        boxes = [decoded(level_deltas[row].astype(np.float64), level_anchors[row]) for row in order]
        height, width = image_size
        boxes = [np.clip(box, 0, [width, height, width, height]) for box in boxes]
        valid = [box[2] - box[0] > min_size and box[3] - box[1] > min_size for box in boxes]
        for row in greedy_nms(boxes, level_logits[order], valid, iou_threshold=nms_threshold):
            found.append((level_logits[order[row]], boxes[row]))
    found.sort(key=lambda pair: -pair[0])
    return found[:post_nms_topk]


@pytest.mark.parametrize(("coder", "decoded"), [(CODER, decoded), (CORNERS, decoded_corners)])
@pytest.mark.parametrize(
    ("pre", "post", "threshold", "min_size"),
    [(15, 12, 0.7, 0.0), (100, 100, 0.3, 0.0), (100, 100, 0.7, 12.0)],
)
def test_proposals_against_the_loops(pre, post, threshold, min_size, coder, decoded):
    rng = np.random.default_rng(3)
    anchors = tuple(random_anchors(rng, count) for count in (40, 24, 6))
    anchors[0][5] = anchors[0][6] = [-40, -40, -10, -12]  # becomes empty when clipped
    deltas = tuple(rng.normal(0, 0.2, (len(level), 4)).astype(np.float32) for level in anchors)
    logits = tuple(rng.normal(size=len(level)).astype(np.float32) for level in anchors)
    logits[0][5] = 9.0
    arguments = {
        "pre_nms_topk": pre,
        "post_nms_topk": post,
        "nms_threshold": threshold,
        "min_size": min_size,
    }
    settings = ProposalSettings(**arguments)
    found = jax.jit(lambda *arrays: generate_proposals(*arrays, box_coder=coder, settings=settings))(
        logits, deltas, anchors, np.array([64, 72], np.int32)
    )
    expected = proposals_by_loops(logits, deltas, anchors, (64, 72), decoded=decoded, **arguments)
    assert len(found.valid) == min(post, sum(min(pre, len(level)) for level in anchors))
    number = int(found.valid.sum())
    assert number == len(expected)
    np.testing.assert_array_equal(found.valid, np.arange(len(found.valid)) < number)
    np.testing.assert_array_equal(found.objectness_logits[:number], [logit for logit, _ in expected])
    np.testing.assert_allclose(found.boxes[:number], [box for _, box in expected], atol=1e-4)


def is_outputs(x):
    return isinstance(x, RPNOutputs)


def make_rpn(*, sizes=((16.0,), (32.0,)), batch_size_per_image=256, iou_thresholds=(0.3, 0.7), **fields):
    return RPN(
        features=8,
        levels=(3, 4),
        anchor_generator=AnchorGenerator(sizes=sizes, strides=(8, 16)),
        sampling=AnchorSampling(batch_size_per_image=batch_size_per_image, iou_thresholds=iou_thresholds),
        **fields,
    )


def test_shapes_and_parameters():
    rpn = make_rpn(sizes=((16.0, 24.0), (32.0, 48.0)))
    pyramid = {"p3": jnp.zeros((2, 13, 10, 16)), "p4": jnp.zeros((2, 7, 5, 16))}
    leaves, variables = jax.eval_shape(
        lambda: jax.tree.map(
            jax.tree.leaves, rpn.init_with_output(jax.random.key(0), pyramid, (100, 80)), is_leaf=is_outputs
        )
    )
    # 6 anchors in each of 13 x 10 and 7 x 5 cells: logits, deltas, anchors.
    assert [leaf.shape for leaf in leaves] == [
        (2, 780),
        (2, 210),
        (2, 780, 4),
        (2, 210, 4),
        (780, 4),
        (210, 4),
    ]
    # One head for both levels: 3x3 from 16 to 8, then 1x1 to 6 logits and to 24 deltas.
    assert num_params(variables) == (9 * 16 * 8 + 8) + (8 * 6 + 6) + (8 * 24 + 24)


def test_the_anchors_are_where_the_config_says():
    pyramid = {"p3": jnp.zeros((1, 2, 3, 16)), "p4": jnp.zeros((1, 1, 2, 16))}
    fields = {
        "model.rpn.anchor_sizes": ((16.0,), (32.0,)),
        "model.rpn.aspect_ratios": (0.5, 2.0),
        "model.rpn.anchor_offset": 0.0,
        "model.rpn.round_anchors": True,
    }
    rpn = thin_model(**fields).rpn
    outputs, _ = rpn.init_with_output(jax.random.key(0), pyramid, (16, 24))
    expected = AnchorGenerator(
        sizes=((16.0,), (32.0,)), aspect_ratios=(0.5, 2.0), strides=(8, 16), offset=0.0, round_sizes=True
    ).grid((16, 24))
    for found, level in zip(outputs.anchors, expected, strict=True):
        np.testing.assert_array_equal(found, level)


def test_the_heads_order_is_that_of_the_anchors():
    head = RPNHead(features=1, num_anchors=3)
    centre = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    params = {
        "conv": {"kernel": centre, "bias": jnp.zeros(1)},
        "objectness_logits": {"kernel": jnp.array([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3), "bias": jnp.zeros(3)},
        "anchor_deltas": {"kernel": jnp.arange(12.0).reshape(1, 1, 1, 12), "bias": jnp.zeros(12)},
    }
    features = jnp.zeros((1, 4, 5, 1)).at[0, 2, 3, 0].set(1.0)
    logits, deltas = head.apply({"params": params}, features)
    first = (2 * 5 + 3) * 3  # row 2, column 3
    expected = np.zeros(60)
    expected[first : first + 3] = [1, 2, 3]
    np.testing.assert_allclose(logits[0], expected)
    np.testing.assert_allclose(deltas[0, first : first + 3], np.arange(12.0).reshape(3, 4))
    assert float(jnp.abs(deltas).sum()) == 66  # 0 + 1 + ... + 11, and zero elsewhere


def losses_of(rpn, outputs, gt, image_valid, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(image_valid))
    return jax.jit(lambda *arguments: rpn.apply({}, *arguments, method="losses"))(
        outputs, gt, image_valid, keys
    )


def random_outputs(rng, *, images, counts=(40, 12)):
    return RPNOutputs(
        objectness_logits=tuple(jnp.asarray(rng.normal(size=(images, n)), jnp.float32) for n in counts),
        anchor_deltas=tuple(jnp.asarray(rng.normal(0, 0.3, (images, n, 4)), jnp.float32) for n in counts),
        anchors=tuple(jnp.asarray(random_anchors(rng, n)) for n in counts),
    )


BOXES = [
    [[5, 5, 35, 30], [30, 25, 60, 60], [0, 0, 1, 1], [0, 0, 1, 1]],
    [[10, 0, 40, 40], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
]
VALID = [[True, True, False, False], [True, False, False, False]]


def test_losses_against_the_loops():
    rng = np.random.default_rng(0)
    outputs, beta = random_outputs(rng, images=2), 1.0 / 9.0
    near = np.concatenate([np.tile(np.float32(boxes[:2]), (6, 1)) for boxes in BOXES])
    near = near + rng.normal(0, 4, near.shape).astype(np.float32)
    near[near[:, 2] < 10] = [5, 5, 33, 33]  # the second image's padded slot
    outputs = outputs.replace(anchors=(jnp.concatenate([outputs.anchors[0][:16], near]), outputs.anchors[1]))
    rpn = make_rpn(batch_size_per_image=120, iou_thresholds=(0.3, 0.5))  # enough to take every anchor
    found = losses_of(rpn, outputs, ground_truth(BOXES, valid=VALID), np.array([True, True]))
    anchors = np.concatenate(outputs.anchors)
    cls = loc = positives = ignored = 0.0
    for i in range(2):
        logits = np.concatenate([np.float64(level[i]) for level in outputs.objectness_logits])
        deltas = np.concatenate([np.float64(level[i]) for level in outputs.anchor_deltas])
        slots, labels, _ = match(
            anchors, BOXES[i], [False] * 4, VALID[i], low=0.3, high=0.5, allow_low_quality_matches=True
        )
        for row, label in enumerate(labels):
            positives, ignored = positives + (label == 1), ignored + (label == -1)
            if label >= 0:
                cls += np.log1p(np.exp(-logits[row] if label == 1 else logits[row]))
            if label == 1:
                error = np.abs(deltas[row] - encoded(BOXES[i][slots[row]], anchors[row]))
                loc += np.where(error < beta, error**2 / 2 / beta, error - beta / 2).sum()
    assert positives > 4
    assert ignored > 4
    # The normalizer is the number of anchors to be sampled, 120 in each of two images.
    np.testing.assert_allclose(found["loss_rpn_cls"], cls / 240, rtol=1e-5)
    np.testing.assert_allclose(found["loss_rpn_loc"], loc / 240, rtol=1e-5)


def test_the_box_loss_is_in_the_units_of_the_coder():
    # One anchor of 20 x 10 pixels, its object 2 pixels further right, a tenth of the side. By edges that is
    # 0.1^2 / 2 twice, by the centre once. The normalizer is the 2 anchors to be sampled.
    outputs = RPNOutputs(
        objectness_logits=(jnp.zeros((1, 1)),),
        anchor_deltas=(jnp.zeros((1, 1, 4)),),
        anchors=(jnp.array([[10.0, 10.0, 30.0, 20.0]]),),
    )
    gt = ground_truth([[[12, 10, 32, 20]]])
    for coder, expected in ((CORNERS, 0.01), (CODER, 0.005)):
        rpn = make_rpn(batch_size_per_image=2, smooth_l1_beta=1.0, box_coder=coder)
        found = losses_of(rpn, outputs, gt, np.array([True]))
        np.testing.assert_allclose(found["loss_rpn_loc"], expected / 2, rtol=1e-4)


def test_the_config_names_the_coder():
    assert thin_model().rpn.box_coder == CODER
    assert thin_model(**{"model.rpn.box_coder": "center"}).rpn.box_coder == CODER
    assert thin_model(**{"model.rpn.box_coder": "corner"}).rpn.box_coder == CORNERS
    with pytest.raises(ValueError, match=r"config.model.rpn.box_coder = 'edges' is unknown; choose one of"):
        thin_model(**{"model.rpn.box_coder": "edges"})


def test_an_image_that_only_fills_the_batch_counts_for_nothing():
    outputs = random_outputs(np.random.default_rng(0), images=2)
    rpn = make_rpn(batch_size_per_image=120)
    gt = ground_truth(BOXES, valid=VALID)
    found = losses_of(rpn, outputs, gt, np.array([True, False]))
    first = jax.tree.map(lambda x: x[:1], (outputs.objectness_logits, outputs.anchor_deltas, gt))
    alone = outputs.replace(objectness_logits=first[0], anchor_deltas=first[1])
    expected = losses_of(rpn, alone, first[2], np.array([True]))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_padded_slots_change_nothing():
    outputs = random_outputs(np.random.default_rng(1), images=2)
    rpn = make_rpn(batch_size_per_image=16)
    junk = np.array([[[3, 3, 40, 40], [np.float32(1e6), 0, 1e6, 2]]] * 2, np.float32)
    few = losses_of(rpn, outputs, ground_truth(BOXES, valid=VALID), np.array([True, True]))
    many = losses_of(
        rpn,
        outputs,
        ground_truth(np.concatenate([BOXES, junk], axis=1), valid=np.pad(VALID, ((0, 0), (0, 2)))),
        np.array([True, True]),
    )
    for name, value in few.items():
        np.testing.assert_array_equal(many[name], value)


def test_no_objects_leave_only_background_and_finite_gradients():
    outputs = random_outputs(np.random.default_rng(2), images=2)
    rpn, gt = make_rpn(batch_size_per_image=16), ground_truth(BOXES, valid=np.zeros((2, 4), bool))

    def total(logits, deltas):
        losses = losses_of(
            rpn, outputs.replace(objectness_logits=logits, anchor_deltas=deltas), gt, np.array([True, True])
        )
        return sum(losses.values()), losses

    (_, losses), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        outputs.objectness_logits, outputs.anchor_deltas
    )
    assert float(losses["loss_rpn_loc"]) == 0.0
    assert 0.0 < float(losses["loss_rpn_cls"]) < 5.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients[1]))


def test_proposals_carry_no_gradient():
    outputs = random_outputs(np.random.default_rng(2), images=1)
    rpn = make_rpn(
        train_proposals=ProposalSettings(pre_nms_topk=20, post_nms_topk=24),
        eval_proposals=ProposalSettings(pre_nms_topk=10, post_nms_topk=8),
    )
    size = jnp.array([[64, 72]], jnp.int32)

    def total(deltas):
        proposals = rpn.apply(
            {}, outputs.replace(anchor_deltas=deltas), size, train=True, method="predict_proposals"
        )
        return proposals.boxes.sum(), proposals

    gradient, proposals = jax.jit(jax.grad(total, has_aux=True))(outputs.anchor_deltas)
    assert proposals.boxes.shape == (1, 24, 4)
    assert all((np.asarray(leaf) == 0).all() for leaf in gradient)
    evaluated = jax.jit(lambda o: rpn.apply({}, o, size, train=False, method="predict_proposals"))(outputs)
    assert evaluated.boxes.shape == (1, 8, 4)


def test_whole_pixels_are_left_of_an_anchor_beside_the_image():
    anchors = (np.array([[80, 10, 90, 20], [10, 10, 30, 30]], np.float32),)
    arrays = (np.array([1.0, 0], np.float32),), (np.zeros((2, 4), np.float32),), anchors

    def propose(**fields):
        settings = ProposalSettings(pre_nms_topk=2, post_nms_topk=2, **fields)
        step = jax.jit(lambda *arrays: generate_proposals(*arrays, box_coder=CORNERS, settings=settings))
        return step(*arrays, np.array([64, 72], np.int32))

    assert propose().valid.sum() == 1
    found = propose(plus_one_widths=True)
    np.testing.assert_array_equal(found.boxes, [[71, 10, 72, 20], [10, 10, 30, 30]])
    assert found.valid.all()
