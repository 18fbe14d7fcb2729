import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.postprocess.voting import (
    VARIANCE_MODES,
    box_voting,
    iou_voting,
    variance_voting,
)
from tests.references.boxes import iou_matrix
from tests.references.voting import crowded_case, on_device, sampled_variances, vote_weights, weighted_mean

METHODS = ("variance", "variance_score", "iou", "iou_score", "box_voting")
# Away from the defaults, so that far neighbours matter too.
OPTIONS = {
    "variance": {"sigma_t": 0.1},
    "variance_score": {"sigma_t": 0.1},
    "iou": {"sigma_t": 0.1},
    "iou_score": {"sigma_t": 0.1},
    "box_voting": {"iou_threshold": 0.4},
}

# IoU of the two: 80 / 120 = 2/3.
BOXES = jnp.array([[0.0, 0, 10, 10], [2.0, 0, 12, 10]])
VARIANCES = jnp.array([[1.0, 1, 4, 1], [1.0, 1, 1, 1]])
SCORES = jnp.array([0.8, 0.4])
SAME = jnp.zeros(2, jnp.int32)
ALL = jnp.ones(2, bool)
# exp(-(1 - 2/3)^2 / 0.1)
Q = math.exp(-1 / 9 / 0.1)


def call(method, case, **options):
    """Any of them, with a case as its arguments."""
    options = {
        "reported_variances": case["reported"],
        "kept_variances": case["kept_variances"],
        **OPTIONS[method],
        **options,
    }
    kept = (case["kept_boxes"], case["kept_classes"], case["boxes"])
    rest = (case["classes"], case["valid"])
    if method == "box_voting":
        return box_voting(*kept, case["scores"], *rest, **options)
    if method.endswith("_score"):
        options["candidate_scores"] = case["scores"]
    if method in ("iou", "iou_score"):
        return iou_voting(*kept, *rest, **options)
    return variance_voting(*kept, case["variances"], *rest, **options)


jitted_call = jax.jit(call, static_argnames=("method", "variance_mode", "sigma_t"))


def pair(method, **changes):
    """The two boxes above, the first of them kept."""
    options = {
        name: changes.pop(name) for name in ("sigma_t", "iou_threshold", "variance_mode") if name in changes
    }
    case = {
        "kept_boxes": BOXES[:1],
        "kept_classes": SAME[:1],
        "kept_variances": VARIANCES[:1],
        "boxes": BOXES,
        "scores": SCORES,
        "classes": SAME,
        "valid": ALL,
        "variances": VARIANCES,
        "reported": VARIANCES,
        **changes,
    }
    return call(method, case, **options)


@pytest.mark.parametrize("mode", VARIANCE_MODES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_loops(method, mode):
    for seed in range(4):
        case = crowded_case(seed)
        boxes, variances = weighted_mean(vote_weights(method, case, **OPTIONS[method]), case, mode)
        result = jitted_call(method, on_device(case), variance_mode=mode)
        np.testing.assert_allclose(result.boxes, boxes, rtol=1e-5)
        np.testing.assert_allclose(result.variances, variances, rtol=1e-5)
        # The last two kept boxes have no voter.
        assert not np.asarray(result.variances[-2:]).any()
        np.testing.assert_array_equal(result.boxes[-2:], case["kept_boxes"][-2:])
        moved = np.abs(result.boxes - case["kept_boxes"]).max(axis=1) > 0.1
        assert moved[:10].sum() >= 5


@pytest.mark.parametrize("method", METHODS)
def test_fused_variance_is_that_of_independent_draws(method):
    draws = 50_000  # a standard error of 0.6 % of the variance
    rng = np.random.default_rng(3)
    boxes = np.array([[10.0, 10, 60, 60]] * 6) + rng.uniform(-5, 5, (6, 4))
    reported = rng.uniform(1, 20, (6, 4))
    case = {
        "boxes": boxes,
        "scores": rng.uniform(0.1, 1, 6),
        "classes": np.array([0, 0, 0, 0, 1, 1], np.int32),
        "valid": np.array([True] * 5 + [False]),
        "variances": rng.uniform(0.5, 4, (6, 4)),
        "reported": reported,
        "kept_boxes": boxes[[0, 2]],
        "kept_classes": np.zeros(2, np.int32),
        "kept_variances": reported[[0, 2]],
    }
    weights = vote_weights(method, case, **OPTIONS[method])
    expected = sampled_variances(weights, boxes, reported, draws=draws, seed=0)
    result = jitted_call(method, on_device(case), variance_mode="fused")
    np.testing.assert_allclose(result.variances, expected, rtol=0.02)
    # Four voters: well below that of any.
    assert (
        result.variances < 0.75 * jitted_call(method, on_device(case), variance_mode="average").variances
    ).all()


def test_variance_voting_by_hand():
    # p of the second is Q. x1: (0 + 2 Q) / (1 + Q). x2: (10 / 4 + 12 Q) / (1/4 + Q).
    result = pair("variance", sigma_t=0.1)
    np.testing.assert_allclose(
        result.boxes, [[2 * Q / (1 + Q), 0, (2.5 + 12 * Q) / (0.25 + Q), 10]], rtol=1e-6
    )
    # The variance is averaged with the same weights: x2 (1/4 * 4 + Q * 1) / (1/4 + Q).
    np.testing.assert_allclose(result.variances, [[1, 1, (1 + Q) / (0.25 + Q), 1]], rtol=1e-6)


def test_variance_voting_by_score_by_hand():
    # Scores 0.8 and 0.4 halve the second's weight. x2: (0.8 * 10 / 4 + 0.4 * 12 Q) / (0.8 / 4 + 0.4 Q).
    result = pair("variance_score", sigma_t=0.1)
    expected = (2 + 4.8 * Q) / (0.2 + 0.4 * Q)
    np.testing.assert_allclose(result.boxes, [[2 * Q / (2 + Q), 0, expected, 10]], rtol=1e-6)
    # The variances 4 and 1 under the same weights.
    assert result.variances[0, 2] == pytest.approx((0.8 + 0.4 * Q) / (0.2 + 0.4 * Q), rel=1e-6)


def test_reported_variances_come_back_and_have_no_weight():
    reported = jnp.array([[9.0, 9, 9, 9], [25.0, 25, 25, 25]])
    result = pair("variance", sigma_t=0.1, reported=reported)
    np.testing.assert_array_equal(result.boxes, pair("variance", sigma_t=0.1).boxes)
    assert result.variances[0, 0] == pytest.approx((9 + 25 * Q) / (1 + Q), rel=1e-6)
    assert result.variances[0, 2] == pytest.approx((9 / 4 + 25 * Q) / (1 / 4 + Q), rel=1e-6)


def test_variance_voting_reports_its_weights_by_default():
    arguments = (BOXES[:1], SAME[:1], BOXES, VARIANCES, SAME, ALL)
    np.testing.assert_array_equal(
        variance_voting(*arguments).variances,
        variance_voting(*arguments, reported_variances=VARIANCES).variances,
    )


def test_fused_and_winner_by_hand():
    # x2: weights 1/4 and Q, variances 4 and 1: (4/16 + Q^2) / (1/4 + Q)^2.
    fused = pair("variance", sigma_t=0.1, variance_mode="fused")
    assert fused.variances[0, 2] == pytest.approx((0.25 + Q**2) / (0.25 + Q) ** 2, rel=1e-6)
    winner = pair("variance", sigma_t=0.1, variance_mode="winner")
    np.testing.assert_array_equal(winner.variances, VARIANCES[:1])
    np.testing.assert_array_equal(winner.boxes, fused.boxes)


def test_voting_without_variances_by_hand():
    iou = pair("iou", sigma_t=0.1)
    np.testing.assert_allclose(
        iou.boxes, [[2 * Q / (1 + Q), 0, (10 + 12 * Q) / (1 + Q), 10]], rtol=1e-6, atol=1e-6
    )
    assert iou.variances[0, 2] == pytest.approx((4 + Q) / (1 + Q), rel=1e-6)
    # Scores 0.8 and 0.4: the second has half the weight.
    both = pair("iou_score", sigma_t=0.1)
    assert both.boxes[0, 0] == pytest.approx(2 * Q / 2 / (1 + Q / 2), rel=1e-6)
    # (0.8 * 0 + 0.4 * 2) / 1.2
    assert pair("box_voting", iou_threshold=0.6).boxes[0, 0] == pytest.approx(2 / 3, rel=1e-6)


def test_box_voting_threshold():
    # [0, 3] and [1, 4] share 2 of 4: IoU exactly 1/2, which votes at 1/2. The third touches neither.
    boxes = jnp.array([[0.0, 0, 3, 1], [1.0, 0, 4, 1], [9.0, 0, 12, 1]])
    arguments = (
        boxes[:1],
        SAME[:1],
        boxes,
        jnp.array([0.5, 0.5, 0.25]),
        jnp.zeros(3, jnp.int32),
        jnp.ones(3, bool),
    )
    x1 = {
        threshold: box_voting(*arguments, iou_threshold=threshold).boxes[0, 0]
        for threshold in (0.0, 0.5, 0.51)
    }
    # Everything: (0.5 * 0 + 0.5 * 1 + 0.25 * 9) / 1.25.
    np.testing.assert_allclose([x1[0.0], x1[0.5], x1[0.51]], [2.2, 0.5, 0], rtol=1e-6)
    for threshold in (0.51, 1.0):
        np.testing.assert_array_equal(box_voting(*arguments, iou_threshold=threshold).boxes, boxes[:1])
    np.testing.assert_array_equal(
        box_voting(*arguments).boxes, box_voting(*arguments, iou_threshold=0.5).boxes
    )


@pytest.mark.parametrize("mode", VARIANCE_MODES)
def test_equal_variances_are_iou_voting(mode):
    case = crowded_case(5)
    case["variances"][case["valid"]] = 0.37
    with_variances = jitted_call("variance", on_device(case), variance_mode=mode)
    without = jitted_call("iou", on_device(case), variance_mode=mode)
    np.testing.assert_allclose(with_variances.boxes, without.boxes, rtol=2e-6)
    np.testing.assert_allclose(with_variances.variances, without.variances, rtol=2e-6)


def test_equal_scores_have_no_weight():
    case = crowded_case(6)
    case["scores"][case["valid"]] = 0.3
    for with_scores, without in (("iou_score", "iou"), ("variance_score", "variance")):
        np.testing.assert_allclose(
            jitted_call(with_scores, on_device(case)).boxes,
            jitted_call(without, on_device(case)).boxes,
            rtol=2e-6,
        )


def test_wide_sigma_t_is_the_plain_mean():
    case = crowded_case(7)
    result = jitted_call("iou", on_device(case), sigma_t=math.inf)
    votes = (iou_matrix(case["kept_boxes"], np.nan_to_num(case["boxes"])) > 0) & case["valid"]
    votes &= case["kept_classes"][:, None] == case["classes"]
    for kept in range(10):
        np.testing.assert_allclose(result.boxes[kept], case["boxes"][votes[kept]].mean(axis=0), rtol=1e-5)


def test_narrow_sigma_t_leaves_the_box():
    np.testing.assert_array_equal(pair("iou", sigma_t=1e-4).boxes, BOXES[:1])
    np.testing.assert_array_equal(pair("iou_score", sigma_t=1e-4).variances, VARIANCES[:1])


def test_small_scores_do_not_underflow():
    # Their squares are below the smallest float32.
    for mode in ("average", "fused"):
        for method in ("variance_score", "iou_score", "box_voting"):
            small = pair(method, scores=1e-25 * SCORES, variance_mode=mode)
            normal = pair(method, variance_mode=mode)
            np.testing.assert_allclose(small.boxes, normal.boxes, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(small.variances, normal.variances, rtol=1e-5)


@pytest.mark.parametrize("mode", VARIANCE_MODES)
@pytest.mark.parametrize("method", ["iou", "iou_score", "box_voting"])
def test_a_head_without_variances(method, mode):
    without = pair(method, reported=None, kept_variances=None, variance_mode=mode)
    assert without.variances is None
    np.testing.assert_array_equal(without.boxes, pair(method, variance_mode=mode).boxes)


@pytest.mark.parametrize("method", METHODS)
def test_duplicates_do_not_shrink_the_average(method):
    count = 50
    case = {
        "kept_boxes": BOXES[:1],
        "kept_classes": SAME[:1],
        "kept_variances": jnp.full((1, 4), 3.0),
        "boxes": jnp.tile(BOXES[:1], (count, 1)),
        "scores": jnp.full(count, 0.7),
        "classes": jnp.zeros(count, jnp.int32),
        "valid": jnp.ones(count, bool),
        "variances": jnp.full((count, 4), 3.0),
        "reported": jnp.full((count, 4), 3.0),
    }
    result = call(method, case)
    np.testing.assert_allclose(result.boxes, BOXES[:1], rtol=1e-6)
    np.testing.assert_allclose(result.variances, np.full((1, 4), 3), rtol=1e-6)
    fused = call(method, case, variance_mode="fused")
    np.testing.assert_allclose(fused.variances, np.full((1, 4), 3 / count), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("neighbour", ["other class", "not valid", "apart"])
def test_no_neighbour_no_change(method, neighbour):
    changes = {
        "other class": {"classes": jnp.arange(2)},
        "not valid": {"valid": jnp.array([True, False]), "variances": VARIANCES.at[1].set(jnp.nan)},
        "apart": {"boxes": BOXES.at[1].add(10.0)},
    }[neighbour]
    result = pair(method, **changes)
    np.testing.assert_array_equal(result.boxes, BOXES[:1])
    np.testing.assert_array_equal(result.variances, VARIANCES[:1])


def test_certain_neighbour_wins():
    # p is 0.0039, but a millionth of the variance outweighs it: off by 2 / 3900.
    certain = jnp.array([[1e3] * 4, [1e-3] * 4])
    np.testing.assert_allclose(pair("variance", variances=certain, sigma_t=0.02).boxes, BOXES[1:], atol=1e-3)


@pytest.mark.parametrize("mode", VARIANCE_MODES)
@pytest.mark.parametrize("method", METHODS)
def test_without_a_vote_the_box_stays(method, mode):
    # An empty box has IoU 0 even with itself.
    point = jnp.tile(jnp.array([[5.0, 5, 5, 5]]), (2, 1))
    result = pair(method, kept_boxes=point[:1], boxes=point, variance_mode=mode)
    np.testing.assert_array_equal(result.boxes, point[:1])
    np.testing.assert_array_equal(result.variances, np.zeros((1, 4)))
    if method in ("variance_score", "iou_score", "box_voting"):
        unheard = pair(method, scores=0 * SCORES, variance_mode=mode)
        np.testing.assert_array_equal(unheard.boxes, BOXES[:1])
        np.testing.assert_array_equal(unheard.variances, np.zeros((1, 4)))


@pytest.mark.parametrize("method", METHODS)
def test_voted_boxes_stay_between_their_voters(method):
    case = crowded_case(8, slots=200, count=200)
    for name in ("boxes", "kept_boxes"):
        case[name] += np.float32(1200)
    result = jitted_call(method, on_device(case))
    threshold = OPTIONS[method].get("iou_threshold", 1e-9)
    votes = iou_matrix(case["kept_boxes"], case["boxes"]) >= threshold
    votes &= case["kept_classes"][:, None] == case["classes"]
    assert votes[:10].sum(axis=1).mean() > 2
    for kept in range(10):
        voters = case["boxes"][votes[kept]]
        assert (result.boxes[kept] >= voters.min(axis=0) - 1e-3).all()
        assert (result.boxes[kept] <= voters.max(axis=0) + 1e-3).all()


@pytest.mark.parametrize("mode", VARIANCE_MODES)
@pytest.mark.parametrize("method", METHODS)
def test_padding_has_no_effect_on_values_or_gradients(method, mode):
    case = on_device(crowded_case(9))
    names = ("boxes", "scores", "variances", "reported", "kept_boxes", "kept_variances")

    def total(floats):
        result = call(method, {**case, **floats}, variance_mode=mode)
        return result.boxes.sum() + jnp.sqrt(result.variances + 1.0).sum()

    value_and_grad = jax.jit(jax.value_and_grad(total))
    rubbish = {name: case[name] for name in names}
    rows = case["valid"]
    harmless = {
        name: values
        if name.startswith("kept")
        else jnp.where(rows if values.ndim == 1 else rows[:, None], values, 1.0)
        for name, values in rubbish.items()
    }
    value, gradients = value_and_grad(rubbish)
    other_value, other_gradients = value_and_grad(harmless)
    assert value == other_value
    for name in names:
        assert np.isfinite(gradients[name]).all()
        np.testing.assert_array_equal(gradients[name], other_gradients[name])
    for name in names[:4]:
        assert not np.asarray(gradients[name])[~np.asarray(rows)].any()
    assert np.asarray(gradients["boxes"]).any()


@pytest.mark.parametrize("method", METHODS)
def test_jit_batch_and_one_trace(method):
    traces = []

    @functools.partial(jax.jit, static_argnames="method")
    def run(method, case):
        traces.append(1)
        return call(method, case, variance_mode="fused")

    cases = [on_device(crowded_case(seed, count=count)) for seed, count in ((10, 20), (11, 55))]
    single = [run(method, case) for case in cases]
    assert len(traces) == 1
    eager = call(method, cases[0], variance_mode="fused")
    batched = jax.jit(jax.vmap(functools.partial(call, method, variance_mode="fused")))(
        jax.tree.map(lambda *rows: jnp.stack(rows), *cases)
    )
    for name in ("boxes", "variances"):
        np.testing.assert_allclose(getattr(single[0], name), getattr(eager, name), rtol=1e-5)
        for row, one in enumerate(single):
            np.testing.assert_allclose(getattr(batched, name)[row], getattr(one, name), rtol=1e-5)


@pytest.mark.parametrize("method", ["variance", "iou", "iou_score"])
def test_sigma_t_must_be_positive(method):
    with pytest.raises(ValueError, match="sigma_t"):
        pair(method, sigma_t=0.0)


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_box_voting_threshold_is_an_iou(threshold):
    with pytest.raises(ValueError, match="iou_threshold"):
        pair("box_voting", iou_threshold=threshold)


def test_variance_mode_is_checked():
    with pytest.raises(ValueError, match="average, fused, winner"):
        pair("iou", variance_mode="mean")
    with pytest.raises(ValueError, match="kept_variances"):
        pair("variance", variance_mode="winner", kept_variances=None)
