import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.postprocess.detect import detect, unscale, weigh_by_std
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch, BoxPredictions, Detections, GroundTruth, Proposals
from tests.references.algorithm1 import algorithm1
from tests.references.localization import scores_by_std

K = 3
HEIGHT, WIDTH = 240, 320
SIZE = jnp.array([HEIGHT, WIDTH])
CODER = CornerBoxCoder()
VOTING = PostprocessSettings(suppression="soft_gaussian", voting="variance", detections_per_image=30)
SURE_FIRST = dataclasses.replace(VOTING, voting="variance_score", sigma_t=0.05, score_by_std=4.0)


def random_inputs(seed, slots=64, count=None, agnostic=False, variances=True):
    """Proposals in clusters, some of them over the border, the last rows padding that would score best."""
    rng = np.random.default_rng(seed)
    count = count if count is not None else int(rng.integers(10, slots))
    centers = rng.uniform(0, [WIDTH, HEIGHT], (6, 2))
    middle = centers[rng.integers(0, 6, slots)] + rng.normal(0, 5, (slots, 2))
    sides = rng.uniform(8, 50, (slots, 2))
    logits = rng.normal(0, 1.5, (slots, K + 1))
    logits[count:, 0] = 50
    rows = 1 if agnostic else K
    predictions = BoxPredictions(
        class_logits=jnp.asarray(logits, jnp.float32),
        box_deltas=jnp.asarray(rng.normal(0, 1, (slots, rows, 4)), jnp.float32),
        box_log_vars=jnp.asarray(rng.uniform(-9, 9, (slots, rows, 4)), jnp.float32) if variances else None,
    )
    proposals = Proposals(
        boxes=jnp.asarray(np.concatenate([middle - sides, middle + sides], 1), jnp.float32),
        objectness_logits=jnp.zeros(slots),
        valid=jnp.arange(slots) < count,
    )
    return predictions, proposals


@functools.partial(jax.jit, static_argnames=("settings",))
def run(predictions, proposals, *, settings):
    return detect(predictions, proposals, SIZE, settings=settings, box_coder=CODER)


def oracle(predictions, proposals, settings):
    """From logits to detections in float64, one pair of proposal and class after the other."""
    predictions = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), predictions)
    logits, references = predictions.class_logits, np.asarray(proposals.boxes, np.float64)
    candidates = []
    for p in np.flatnonzero(proposals.valid):
        probabilities = np.exp(logits[p]) / np.exp(logits[p]).sum()
        for k in range(K):
            if probabilities[k] <= settings.score_threshold:
                continue
            row = min(k, predictions.box_deltas.shape[1] - 1)
            x1, y1, x2, y2 = references[p]
            sides = np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
            box = references[p] + predictions.box_deltas[p, row] / 10 * sides
            box = np.minimum(np.maximum(box, 0), [WIDTH, HEIGHT, WIDTH, HEIGHT])
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            candidate = {"proposal": p, "class": k, "score": probabilities[k], "box": box}
            if predictions.box_log_vars is not None:
                variance = np.exp(np.clip(predictions.box_log_vars[p, row], -7, 7))
                candidate |= {"coded": variance, "pixel": variance * (sides / 10) ** 2}
            candidates.append(candidate)
    candidates.sort(key=lambda candidate: -candidate["score"])
    candidates = candidates[: settings.pre_nms_topk]
    columns = {name: np.array([c[name] for c in candidates]) for name in candidates[0]}
    voting = settings.voting in ("variance", "variance_score")
    if settings.voting == "variance_score":
        # A vote of half the score is one of twice the variance.
        columns["coded"] = columns["coded"] / columns["score"][:, None]
    detections = algorithm1(
        columns["box"],
        columns["score"],
        columns["class"],
        method=settings.suppression,
        max_outputs=settings.detections_per_image,
        nms_threshold=settings.nms_threshold,
        sigma=settings.soft_nms_sigma,
        linear_threshold=settings.soft_nms_threshold,
        min_score=settings.soft_nms_min_score,
        sigma_t=settings.sigma_t,
        variances=columns["coded"] if voting else None,
        reported=columns["pixel"] if voting else None,
    )
    for found in detections:
        candidate = candidates[found["index"]]
        found["proposal"] = candidate["proposal"]
        if not voting:
            found["box"], found["variance"] = candidate["box"], candidate.get("pixel")
    if settings.score_by_std:
        scores = scores_by_std(detections, settings.score_by_std)
        for found, score in zip(detections, scores, strict=True):
            found["score"] = score
        detections.sort(key=lambda found: -found["score"])
    return detections


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        PostprocessSettings(),
        PostprocessSettings(suppression="hard", voting="variance", nms_threshold=0.7, pre_nms_topk=40),
        PostprocessSettings(suppression="soft_linear", detections_per_image=20, score_threshold=0.2),
        VOTING,
        SURE_FIRST,
        PostprocessSettings(score_by_std=1.0),
    ],
    ids=["hard", "hard_voting", "soft_linear", "soft_gaussian_voting", "sure_first", "hard_sure_first"],
)
def test_equals_the_slow_road(settings, agnostic):
    found_any = 0
    for seed in range(12):
        predictions, proposals = random_inputs(seed, agnostic=agnostic)
        result = jax.device_get(run(predictions, proposals, settings=settings))
        expected = oracle(predictions, proposals, settings)
        assert result.valid.sum() == len(expected)
        rows = slice(0, len(expected))
        wanted = {name: np.array([found[name] for found in expected]) for name in expected[0]}
        np.testing.assert_array_equal(result.candidate_index[rows], wanted["proposal"])
        np.testing.assert_array_equal(result.classes[rows], wanted["class"])
        # Here an edge may be unsure by several sides, which multiplies the rounding of its std.
        rtol = 2e-4 if settings.score_by_std else 2e-5
        np.testing.assert_allclose(result.scores[rows], wanted["score"], rtol=rtol)
        np.testing.assert_allclose(result.boxes[rows], wanted["box"], atol=1e-3, rtol=0)
        np.testing.assert_allclose(result.box_stds[rows], np.sqrt(wanted["variance"]), rtol=1e-4)
        found_any += len(expected)
    assert found_any > 100


def test_a_head_without_variances():
    predictions, proposals = random_inputs(0, variances=False)
    result = run(predictions, proposals, settings=PostprocessSettings())
    assert result.box_stds is None
    expected = oracle(predictions, proposals, PostprocessSettings())
    np.testing.assert_allclose(result.boxes[0], expected[0]["box"], atol=1e-3)


def test_standard_deviation_by_hand():
    # A proposal 40 wide and 20 high, alpha = log 4: 2 / 10 of the side is 8 and 4 pixels.
    predictions = BoxPredictions(
        class_logits=jnp.array([[5.0, 0, 0, 0]]),
        box_deltas=jnp.zeros((1, 1, 4)),
        box_log_vars=jnp.full((1, 1, 4), np.log(4.0)),
    )
    proposals = Proposals(
        boxes=jnp.array([[10.0, 10, 50, 30]]), objectness_logits=jnp.zeros(1), valid=jnp.ones(1, bool)
    )
    for voting in ("none", "variance"):
        result = run(predictions, proposals, settings=PostprocessSettings(voting=voting))
        np.testing.assert_allclose(result.box_stds[0], [8, 4, 8, 4], rtol=1e-5)
        np.testing.assert_allclose(result.boxes[0], [10, 10, 50, 30], rtol=1e-6)
        assert result.valid.sum() == 1


def test_scores_by_the_std_by_hand():
    # Sides 40 and 20, stds 8 and 4: a fifth of the side at every edge, and exp(-4 / 5). The second box is thinner than
    # a pixel, which counts as one: (1 + 0.05 + 1 + 0.05) / 4.
    boxes = jnp.array([[10.0, 10, 50, 30], [10.0, 10, 10.5, 50]])
    stds = jnp.array([[8.0, 4, 8, 4], [1.0, 2, 1, 2]])
    scores = jnp.array([0.5, 0.8])
    expected = [0.5 * np.exp(-0.8), 0.8 * np.exp(-4 * 0.525)]
    weigh = functools.partial(weigh_by_std, strength=4.0)
    np.testing.assert_allclose(weigh(scores, boxes, stds), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(weigh)(scores, boxes, stds), expected, rtol=1e-6)
    np.testing.assert_array_equal(weigh_by_std(scores, boxes, stds, strength=0.0), scores)


def test_scores_by_the_std_have_finite_gradients():
    # The last row is padding, the one before it an empty box.
    boxes = jnp.array([[10.0, 10, 50, 30], [7.0, 7, 7, 7], [0.0, 0, 0, 0]])
    stds = jnp.array([[8.0, 4, 8, 4], [1.0, 1, 1, 1], [0.0, 0, 0, 0]])

    def total(scores, boxes, stds):
        return weigh_by_std(scores, boxes, stds, strength=4.0).sum()

    scores, edges, deviations = jax.grad(total, argnums=(0, 1, 2))(jnp.array([0.5, 0.8, 0.0]), boxes, stds)
    for gradient in (scores, edges, deviations):
        assert np.isfinite(gradient).all()
    # A wider box is surer of its edges, a larger std less.
    assert edges[0, 2] > 0
    assert (deviations[:2] < 0).all()


def test_scores_by_the_std_leave_the_boxes():
    predictions, proposals = random_inputs(2, count=40)
    plain = run(predictions, proposals, settings=dataclasses.replace(SURE_FIRST, score_by_std=0.0))
    weighed = run(predictions, proposals, settings=SURE_FIRST)
    assert weighed.valid.sum() == plain.valid.sum() > 5
    rows = np.asarray(plain.valid)
    assert sorted(map(tuple, np.asarray(weighed.boxes)[rows].tolist())) == sorted(
        map(tuple, np.asarray(plain.boxes)[rows].tolist())
    )
    assert (np.diff(weighed.scores) <= 0).all()
    assert (np.asarray(weighed.candidate_index) != np.asarray(plain.candidate_index)).any()


def assert_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_padding_moves_nothing():
    predictions, proposals = random_inputs(3, slots=64, count=40)
    cut = jax.tree.map(lambda array: array[:40], (predictions, proposals))
    padded, plain = run(predictions, proposals, settings=VOTING), run(*cut, settings=VOTING)
    assert_close(padded, plain)


def test_a_batch_equals_its_images():
    images = [random_inputs(seed) for seed in range(4)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)
    together = jax.vmap(functools.partial(run, settings=VOTING))(*batch)
    for index, image in enumerate(images):
        alone = run(*image, settings=VOTING)
        row = jax.tree.map(lambda leaf, index=index: leaf[index], together)
        assert_close(row, alone)


def test_one_trace_for_any_number_of_proposals():
    traces = []

    @functools.partial(jax.jit, static_argnames=("settings",))
    def counted(predictions, proposals, settings):
        traces.append(1)
        return detect(predictions, proposals, SIZE, settings=settings, box_coder=CODER)

    for count in (5, 50):
        counted(*random_inputs(0, count=count), settings=dataclasses.replace(VOTING))
    assert len(traces) == 1


@pytest.mark.parametrize("settings", [PostprocessSettings(), VOTING, SURE_FIRST])
def test_no_proposals(settings):
    predictions, proposals = random_inputs(0, count=0)
    proposals = proposals.replace(boxes=jnp.zeros_like(proposals.boxes))
    result = run(predictions, proposals, settings=settings)
    assert not result.valid.any()
    for leaf in jax.tree.leaves(result):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_boxes_outside_the_image_are_dropped():
    predictions, proposals = random_inputs(0, count=64)
    outside = proposals.replace(boxes=proposals.boxes + 1000.0)
    assert not run(predictions, outside, settings=VOTING).valid.any()


def test_unusable_combinations_are_refused():
    predictions, proposals = random_inputs(0)
    with pytest.raises(ValueError, match="CornerBoxCoder"):
        detect(predictions, proposals, SIZE, settings=PostprocessSettings(), box_coder=CenterBoxCoder())
    with pytest.raises(ValueError, match=r"config\.model\.box_loss to a loss with variances"):
        detect(predictions.replace(box_log_vars=None), proposals, SIZE, settings=VOTING, box_coder=CODER)
    plain = detect(
        predictions.replace(box_log_vars=None),
        proposals,
        SIZE,
        settings=PostprocessSettings(),
        box_coder=CenterBoxCoder(),
    )
    assert plain.box_stds is None


SUPPRESSIONS = ("hard", "soft_linear", "soft_gaussian")


@functools.partial(jax.jit, static_argnames=("settings",))
def run_batch(predictions, proposals, *, settings):
    def single(predictions, proposals):
        return detect(predictions, proposals, SIZE, settings=settings, box_coder=CODER)

    return jax.vmap(single)(predictions, proposals)


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("voting", ["iou", "iou_score", "box_voting", "wbf", "bayes"])
def test_every_voting_stands_on_every_suppression(voting, suppression):
    settings = PostprocessSettings(suppression=suppression, voting=voting, detections_per_image=30)
    unvoted = dataclasses.replace(settings, voting="none")
    images = [random_inputs(seed, count=40) for seed in range(2)]
    predictions, proposals = jax.tree.map(lambda *x: jnp.stack(x), *images)
    found = run_batch(predictions, proposals, settings=settings)
    plain = run_batch(predictions, proposals, settings=unvoted)
    assert found.valid.any(axis=1).all()
    boxes, stds = np.asarray(found.boxes)[found.valid], np.asarray(found.box_stds)[found.valid]
    assert np.isfinite(boxes).all()
    # An average of boxes inside the image lies inside it too, but for rounding.
    assert (boxes >= -1e-3).all()
    assert (boxes <= np.array([WIDTH, HEIGHT, WIDTH, HEIGHT]) + 1e-3).all()
    assert np.isfinite(stds).all()
    assert (stds > 0).all()
    scores = np.asarray(found.scores)
    assert (np.diff(scores, axis=1) <= 1e-7).all()
    if voting == "wbf":
        # Fused clusters overlap less than candidates do: no more of them are left.
        assert found.valid.sum() <= plain.valid.sum()
    else:
        # Voting moves boxes and nothing else.
        for name in ("scores", "classes", "candidate_index", "valid"):
            np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
        assert (np.abs(np.asarray(found.boxes - plain.boxes)) > 1e-3).any()


@pytest.mark.parametrize("voting", ["iou", "iou_score", "box_voting", "wbf"])
def test_voting_without_variances(voting):
    settings = PostprocessSettings(voting=voting, detections_per_image=30)
    predictions, proposals = random_inputs(0, count=40)
    with_variances = run(predictions, proposals, settings=settings)
    without = run(predictions.replace(box_log_vars=None), proposals, settings=settings)
    assert without.box_stds is None
    # Another program for the same sums: jax 0.12 orders those of weighted boxes fusion otherwise.
    np.testing.assert_allclose(without.boxes, with_variances.boxes, rtol=1e-6)


def test_what_the_variance_after_voting_means():
    predictions, proposals = random_inputs(1, count=40)
    modes = {
        mode: run(predictions, proposals, settings=dataclasses.replace(VOTING, voting_variance=mode))
        for mode in ("average", "fused", "winner")
    }
    plain = run(predictions, proposals, settings=dataclasses.replace(VOTING, voting="none"))
    for found in modes.values():
        np.testing.assert_array_equal(found.boxes, modes["average"].boxes)
    np.testing.assert_allclose(modes["winner"].box_stds, plain.box_stds, rtol=1e-6)
    # Independent voters would make the mean more certain than any average of them.
    assert (np.asarray(modes["fused"].box_stds) <= np.asarray(modes["average"].box_stds) * (1 + 1e-5)).all()
    assert (np.asarray(modes["fused"].box_stds) < 0.9 * np.asarray(modes["average"].box_stds)).any()


def nearness(boxes, classes):
    """Stands in for an IoU head: the box of side 60 around (100, 100) is best, whatever their class."""
    del classes
    ideal = jnp.array([70.0, 70.0, 130.0, 130.0])
    return jnp.exp(-jnp.square((boxes - ideal[None]) / 200.0).sum(axis=1))


def run_with_ious(settings, seed=0):
    predictions, proposals = random_inputs(seed, count=40, variances=False)
    step = jax.jit(lambda a, b: detect(a, b, SIZE, settings=settings, box_coder=CODER, predict_iou=nearness))
    return step(predictions, proposals)


def test_iou_guided_suppression_and_refinement():
    guided = PostprocessSettings(suppression="iou_guided", detections_per_image=30)
    plain = run_with_ious(guided)
    refined = run_with_ious(
        dataclasses.replace(guided, refine_steps=5, refine_step_size=20.0, refine_keep_best=True)
    )
    before, after = nearness(plain.boxes, None), nearness(refined.boxes, None)
    assert (np.asarray(after - before)[plain.valid] >= -1e-6).all()
    assert (np.asarray(after - before)[plain.valid] > 1e-3).any()
    np.testing.assert_array_equal(refined.scores, plain.scores)
    boxes = np.asarray(refined.boxes)[refined.valid]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()


def test_scores_by_predicted_iou_are_sorted_anew():
    plain = run_with_ious(PostprocessSettings(detections_per_image=30))
    weighed = run_with_ious(PostprocessSettings(detections_per_image=30, score_by_iou=True))
    expected = np.sort(np.asarray(plain.scores * nearness(plain.boxes, None))[plain.valid])[::-1]
    for found in (plain, weighed):
        predicted = np.asarray(jnp.clip(nearness(found.boxes, None), 0, 1))
        np.testing.assert_allclose(found.predicted_ious, np.where(found.valid, predicted, 0), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(weighed.scores)[weighed.valid], expected, rtol=1e-6)
    assert weighed.valid.sum() == plain.valid.sum()
    assert sorted(map(tuple, np.asarray(weighed.boxes).tolist())) == sorted(
        map(tuple, np.asarray(plain.boxes).tolist())
    )


def test_unscale():
    # File of 100 x 50 (w, h) on a canvas of 250 x 100: scales 2.5 and 2. The second image is padding.
    batch = Batch(
        images=np.zeros((2, 256, 256, 3), np.uint8),
        image_size=np.array([[100, 250], [0, 0]]),
        scale=np.array([[2.5, 2.0], [0.0, 0.0]], np.float32),
        image_id=np.array([7, 0]),
        valid=np.array([True, False]),
        gt=GroundTruth(
            boxes=np.zeros((2, 1, 4), np.float32),
            classes=np.zeros((2, 1), np.int32),
            is_crowd=np.zeros((2, 1), bool),
            valid=np.zeros((2, 1), bool),
        ),
    )
    detections = Detections(
        boxes=jnp.tile(jnp.array([25.0, 20, 250.001, 60]), (2, 1, 1)),
        scores=jnp.ones((2, 1)),
        classes=jnp.zeros((2, 1), jnp.int32),
        candidate_index=jnp.zeros((2, 1), jnp.int32),
        valid=jnp.ones((2, 1), bool),
        box_stds=jnp.tile(jnp.array([5.0, 4, 10, 2]), (2, 1, 1)),
    )
    result = unscale(detections, batch)
    np.testing.assert_allclose(result.boxes[0], [[10, 10, 100, 30]], rtol=1e-6)
    np.testing.assert_allclose(result.box_stds[0], [[2, 2, 4, 1]], rtol=1e-6)
    assert np.isfinite(result.boxes).all()
    assert result.scores is detections.scores
    assert unscale(detections.replace(box_stds=None), batch).box_stds is None
