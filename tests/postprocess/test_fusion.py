import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.postprocess.fusion import bayes_fusion, weighted_boxes_fusion
from klbox_jax.postprocess.voting import VARIANCE_MODES, iou_voting
from tests.references.boxes import iou_matrix
from tests.references.fusion import bayes, weighted_boxes
from tests.references.voting import crowded_case, on_device, sampled_variances, weighted_mean

# IoU of the two: 80 / 120 = 2/3.
BOXES = jnp.array([[0.0, 0, 10, 10], [2.0, 0, 12, 10]])
VARIANCES = jnp.array([[1.0, 1, 4, 1], [3.0, 1, 1, 1]])
SAME = jnp.zeros(2, jnp.int32)
ALL = jnp.ones(2, bool)


def call_bayes(case, **options):
    names = ("kept_boxes", "kept_classes", "boxes", "variances", "classes", "valid")
    return bayes_fusion(*(case[name] for name in names), kept_variances=case["kept_variances"], **options)


def call_wbf(case, **options):
    arguments = (case[name] for name in ("boxes", "scores", "classes", "valid"))
    return weighted_boxes_fusion(*arguments, **{"reported_variances": case["reported"], **options})


jitted_bayes = jax.jit(call_bayes, static_argnames=("variance_mode", "affinity"))
jitted_wbf = jax.jit(call_wbf, static_argnames=("variance_mode", "iou_threshold"))


def clusters_of(case, *, iou_threshold, mode):
    """The reference's clusters, each with `variances`."""
    names = ("boxes", "scores", "classes", "valid")
    clusters = weighted_boxes(*(case[name] for name in names), iou_threshold=iou_threshold)
    for cluster in clusters:
        weights = np.zeros((1, len(case["boxes"]), 4))
        for row in cluster["members"]:
            weights[0, row] = case["scores"][row]
        first = cluster["members"][0]
        single = {
            "kept_boxes": case["boxes"][[first]],
            "kept_variances": case["reported"][[first]],
            "boxes": case["boxes"],
            "reported": case["reported"],
        }
        cluster["variances"] = weighted_mean(weights, single, mode)[1][0]
    return clusters


@pytest.mark.parametrize("affinity", [0.4, 0.7])
@pytest.mark.parametrize("mode", VARIANCE_MODES)
def test_bayes_equals_one_measurement_after_another(mode, affinity):
    for seed in range(4):
        case = crowded_case(seed)
        boxes, variances = bayes(case, affinity=affinity, mode=mode)
        result = jitted_bayes(on_device(case), affinity=affinity, variance_mode=mode)
        np.testing.assert_allclose(result.boxes, boxes, rtol=1e-5)
        np.testing.assert_allclose(result.variances, variances, rtol=1e-5)
        np.testing.assert_array_equal(result.boxes[-2:], case["kept_boxes"][-2:])
        assert not np.asarray(result.variances[-2:]).any()


def test_bayes_by_hand():
    # x1: precisions 1 and 1/3: (0 + 2/3) / (4/3) = 1/2, variance 3/4. x2: 1/4 and 1: (2.5 + 12) / 1.25, 4/5.
    arguments = (BOXES[:1], SAME[:1], BOXES, VARIANCES, SAME, ALL)
    result = bayes_fusion(*arguments, affinity=0.6)
    np.testing.assert_allclose(result.boxes, [[0.5, 0, 11.6, 10]], rtol=1e-6)
    np.testing.assert_allclose(result.variances, [[0.75, 0.5, 0.8, 0.5]], rtol=1e-6)
    calibrated = bayes_fusion(*arguments, affinity=0.6, calibration=70.0)
    np.testing.assert_array_equal(calibrated.boxes, result.boxes)
    np.testing.assert_allclose(calibrated.variances, 70 * result.variances, rtol=1e-6)
    # The other modes do not claim independence.
    average = bayes_fusion(*arguments, affinity=0.6, calibration=70.0, variance_mode="average")
    np.testing.assert_allclose(average.variances, [[1.5, 1, 1.6, 1]], rtol=1e-6)
    # At its default the second is too far away, and the centre is alone.
    alone = bayes_fusion(*arguments)
    np.testing.assert_array_equal(alone.boxes, BOXES[:1])
    np.testing.assert_array_equal(alone.variances, VARIANCES[:1])


def test_affinity_is_strict():
    # [0, 3] and [1, 4] share 2 of 4: IoU exactly 1/2.
    boxes = jnp.array([[0.0, 0, 3, 1], [1.0, 0, 4, 1]])
    arguments = (boxes[:1], SAME[:1], boxes, jnp.ones((2, 4)), SAME, ALL)
    np.testing.assert_array_equal(bayes_fusion(*arguments, affinity=0.5).boxes, boxes[:1])
    assert bayes_fusion(*arguments, affinity=0.499).boxes[0, 0] == 0.5


def test_bayes_with_equal_variances_is_the_plain_mean():
    # So is voting by IoU with a width beyond all bounds, among boxes that all overlap.
    case = crowded_case(4)
    case["variances"][case["valid"]] = 6.0
    device = on_device(case)
    fused = jitted_bayes(device, affinity=0.0)
    voted = iou_voting(
        *(device[name] for name in ("kept_boxes", "kept_classes", "boxes", "classes", "valid")),
        sigma_t=float("inf"),
        reported_variances=device["variances"],
        variance_mode="fused",
    )
    np.testing.assert_allclose(fused.boxes, voted.boxes, rtol=2e-6)
    np.testing.assert_allclose(fused.variances, voted.variances, rtol=2e-6)


@pytest.mark.parametrize("method", ["bayes", "wbf"])
def test_fused_variance_is_that_of_independent_draws(method):
    draws = 50_000  # a standard error of 0.6 % of the variance
    rng = np.random.default_rng(3)
    boxes = np.array([[10.0, 10, 60, 60]] * 6) + rng.uniform(-3, 3, (6, 4))
    variances = rng.uniform(1, 20, (6, 4))
    case = {
        "boxes": boxes,
        "scores": np.array([0.9, 0.5, 0.7, 0.3, 0.6, 0.8]),
        "classes": np.array([0, 0, 0, 0, 1, 0], np.int32),
        "valid": np.array([True] * 5 + [False]),
        "variances": variances,
        "reported": variances,
        "kept_boxes": boxes[:1],
        "kept_classes": np.zeros(1, np.int32),
        "kept_variances": variances[:1],
    }
    assert iou_matrix(boxes[:1], boxes[:4]).min() > 0.75
    members = np.array([1.0, 1, 1, 1, 0, 0])[None, :, None]
    if method == "bayes":
        weights = members / variances[None]
        result = call_bayes(on_device(case))
    else:
        weights = np.broadcast_to(members * case["scores"][None, :, None], (1, 6, 4))
        result = call_wbf(on_device(case), variance_mode="fused")
    expected = sampled_variances(weights, boxes, variances, draws=draws, seed=1)
    np.testing.assert_allclose(result.variances[:1], expected, rtol=0.02)


def test_bayes_settings_are_checked():
    arguments = (BOXES[:1], SAME[:1], BOXES, VARIANCES, SAME, ALL)
    for affinity in (-0.1, 1.0):
        with pytest.raises(ValueError, match="affinity"):
            bayes_fusion(*arguments, affinity=affinity)
    with pytest.raises(ValueError, match="calibration"):
        bayes_fusion(*arguments, calibration=0.0)
    with pytest.raises(ValueError, match="kept_variances"):
        bayes_fusion(*arguments, variance_mode="winner")


@pytest.mark.parametrize("threshold", [0.35, 0.55, 0.75])
@pytest.mark.parametrize("mode", VARIANCE_MODES)
def test_wbf_equals_the_lists(mode, threshold):
    sizes = []
    for seed in range(4):
        case = crowded_case(seed)
        clusters = clusters_of(case, iou_threshold=threshold, mode=mode)
        result = jitted_wbf(on_device(case), iou_threshold=threshold, variance_mode=mode)
        count = len(clusters)
        np.testing.assert_array_equal(result.valid, np.arange(60) < count)
        for name, expected in (
            ("boxes", [cluster["box"] for cluster in clusters]),
            ("scores", [cluster["score"] for cluster in clusters]),
            ("classes", [cluster["class"] for cluster in clusters]),
            ("variances", [cluster["variances"] for cluster in clusters]),
            ("indices", [cluster["members"][0] for cluster in clusters]),
        ):
            values = np.asarray(getattr(result, name))
            np.testing.assert_allclose(values[:count], expected, rtol=1e-5, err_msg=name)
            assert not values[count:].any()
        sizes += [len(cluster["members"]) for cluster in clusters]
    assert max(sizes) > 3
    assert min(sizes) == 1


def test_wbf_by_hand_matches_the_fused_box():
    # Rows 1 and 2 meet at IoU 7/13 and fuse to [1.5, 11.5]. Row 0 then meets that at 7/13, though it meets
    # row 1, the first member, at only 5.5/14.5. All three: (0 * 0.6 + 3 * 0.6 + 4.5 * 0.3) / 1.5 = 2.1.
    x1 = jnp.array([4.5, 0.0, 3.0])
    boxes = jnp.stack([x1, jnp.zeros(3), x1 + 10, jnp.full(3, 10.0)], axis=1)
    scores = jnp.array([0.3, 0.6, 0.6])
    result = weighted_boxes_fusion(
        boxes, scores, jnp.full(3, 2), jnp.ones(3, bool), iou_threshold=0.5, reported_variances=boxes + 1
    )
    np.testing.assert_array_equal(result.valid, [True, False, False])
    np.testing.assert_allclose(result.boxes[0], [2.1, 0, 12.1, 10], rtol=1e-6)
    np.testing.assert_allclose(result.variances[0], [3.1, 1, 13.1, 11], rtol=1e-6)
    assert (result.classes[0], result.indices[0]) == (2, 1)
    assert result.scores[0] == pytest.approx(0.5, rel=1e-6)


def test_wbf_joins_the_best_cluster_not_the_first():
    # The third could join the first, at IoU 5.5/14.5, but meets the second at 9/11.
    x1 = jnp.array([0.0, 5.5, 4.5])
    boxes = jnp.stack([x1, jnp.zeros(3), x1 + 10, jnp.full(3, 10.0)], axis=1)
    result = weighted_boxes_fusion(
        boxes,
        jnp.array([0.9, 0.6, 0.3]),
        jnp.zeros(3, jnp.int32),
        jnp.ones(3, bool),
        iou_threshold=0.35,
    )
    # (5.5 * 0.6 + 4.5 * 0.3) / 0.9
    np.testing.assert_allclose(result.boxes[:, 0], [0, 4.65 / 0.9, 0], rtol=1e-6)
    np.testing.assert_allclose(result.scores, [0.9, 0.45, 0], rtol=1e-6)
    assert result.variances is None


def test_wbf_threshold_is_strict():
    boxes = jnp.array([[0.0, 0, 3, 1], [1.0, 0, 4, 1]])
    scores = jnp.array([0.5, 0.25])
    assert weighted_boxes_fusion(boxes, scores, SAME, ALL, iou_threshold=0.5).valid.sum() == 2
    assert weighted_boxes_fusion(boxes, scores, SAME, ALL, iou_threshold=0.499).valid.sum() == 1
    # 1 lets nothing join, not even a duplicate.
    twice = boxes[jnp.array([0, 0])]
    assert weighted_boxes_fusion(twice, scores, SAME, ALL, iou_threshold=1.0).valid.sum() == 2
    assert weighted_boxes_fusion(twice, scores, SAME, ALL).valid.sum() == 1


def test_wbf_leaves_classes_and_empty_boxes_alone():
    scores = jnp.array([0.5, 0.75])
    result = weighted_boxes_fusion(BOXES, scores, jnp.arange(2), ALL, iou_threshold=0.1)
    np.testing.assert_array_equal(result.boxes, BOXES[::-1])
    np.testing.assert_array_equal(result.scores, scores[::-1])
    np.testing.assert_array_equal(result.indices, [1, 0])
    np.testing.assert_array_equal(result.classes, [1, 0])
    point = jnp.full((2, 4), 5.0)
    result = weighted_boxes_fusion(point, scores, SAME, ALL, iou_threshold=0.0)
    np.testing.assert_array_equal(result.boxes, point)


def test_wbf_without_scores():
    # Members of score 0 have no vote, and a box of theirs is that of the first.
    result = weighted_boxes_fusion(BOXES, jnp.zeros(2), SAME, ALL, iou_threshold=0.5)
    np.testing.assert_array_equal(result.valid, [True, False])
    np.testing.assert_array_equal(result.boxes[0], BOXES[0])
    assert not np.asarray(result.scores).any()


def test_wbf_does_not_depend_on_the_order_of_rows():
    case = crowded_case(5)
    case["scores"] = (np.random.default_rng(5).permutation(60) / 64 + 0.01).astype(np.float32)
    order = np.random.default_rng(6).permutation(60)
    shuffled = {name: values if name.startswith("kept") else values[order] for name, values in case.items()}
    first, second = jitted_wbf(on_device(case)), jitted_wbf(on_device(shuffled))
    np.testing.assert_allclose(first.boxes, second.boxes, rtol=1e-5)
    np.testing.assert_allclose(first.scores, second.scores, rtol=1e-5)
    count = int(first.valid.sum())
    np.testing.assert_array_equal(first.indices[:count], order[np.asarray(second.indices[:count])])


def test_wbf_stays_inside_its_members():
    case = crowded_case(7)
    case["boxes"] += np.float32(1200)
    result = jitted_wbf(on_device(case), iou_threshold=0.35)
    for slot, cluster in enumerate(clusters_of(case, iou_threshold=0.35, mode="average")):
        members = case["boxes"][cluster["members"]]
        assert (result.boxes[slot] >= members.min(axis=0) - 1e-3).all()
        assert (result.boxes[slot] <= members.max(axis=0) + 1e-3).all()


def test_wbf_settings_are_checked():
    with pytest.raises(ValueError, match="iou_threshold"):
        weighted_boxes_fusion(BOXES, jnp.ones(2), SAME, ALL, iou_threshold=1.5)
    with pytest.raises(ValueError, match="average, fused, winner"):
        weighted_boxes_fusion(BOXES, jnp.ones(2), SAME, ALL, variance_mode="mean")


@pytest.mark.parametrize("mode", VARIANCE_MODES)
@pytest.mark.parametrize("function", [call_bayes, call_wbf])
def test_padding_has_no_effect_on_values_or_gradients(function, mode):
    case = on_device(crowded_case(9))
    names = ("boxes", "scores", "variances", "reported")

    def total(floats):
        result = function({**case, **floats}, variance_mode=mode)
        return (
            result.boxes.sum()
            + jnp.sqrt(result.variances + 1.0).sum()
            + getattr(result, "scores", jnp.zeros(1)).sum()
        )

    value_and_grad = jax.jit(jax.value_and_grad(total))
    rows = case["valid"]
    rubbish = {name: case[name] for name in names}
    harmless = {
        name: jnp.where(rows if values.ndim == 1 else rows[:, None], values, 1.0)
        for name, values in rubbish.items()
    }
    value, gradients = value_and_grad(rubbish)
    other_value, other_gradients = value_and_grad(harmless)
    assert value == other_value
    for name in names:
        assert np.isfinite(gradients[name]).all()
        np.testing.assert_array_equal(gradients[name], other_gradients[name])
        assert not np.asarray(gradients[name])[~np.asarray(rows)].any()
    assert np.asarray(gradients["boxes"]).any()


def test_wbf_gradient_by_hand():
    # The clusters hold still: the share of each member's score.
    def x1(boxes):
        return weighted_boxes_fusion(boxes, jnp.array([0.75, 0.25]), SAME, ALL).boxes[0, 0]

    np.testing.assert_allclose(jax.grad(x1)(BOXES)[:, 0], [0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize("function", [call_bayes, call_wbf])
def test_jit_batch_and_one_trace(function):
    traces = []

    @jax.jit
    def run(case):
        traces.append(1)
        return function(case)

    cases = [on_device(crowded_case(seed, count=count)) for seed, count in ((10, 20), (11, 55))]
    single = [run(case) for case in cases]
    assert len(traces) == 1
    eager = function(cases[0])
    batched = jax.jit(jax.vmap(function))(jax.tree.map(lambda *rows: jnp.stack(rows), *cases))
    names = ("boxes", "variances") + (("scores", "indices", "valid") if function is call_wbf else ())
    for name in names:
        np.testing.assert_allclose(getattr(single[0], name), getattr(eager, name), rtol=1e-5)
        for row, one in enumerate(single):
            np.testing.assert_allclose(getattr(batched, name)[row], getattr(one, name), rtol=1e-5)


def test_no_candidates():
    nothing = jnp.zeros(0)
    result = weighted_boxes_fusion(
        jnp.zeros((0, 4)), nothing, nothing.astype(jnp.int32), nothing.astype(bool)
    )
    assert result.boxes.shape == (0, 4)
    assert result.valid.shape == (0,)
