"""`legacy=detectron` of the configs against the released code, as `references/detectron_voting.py` tells it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.evaluation.eval_step import detect_batch
from klbox_jax.models.generalized_rcnn import Predictions
from klbox_jax.ops.box_coder import CornerBoxCoder
from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.detect import detect, vote
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.postprocess.suppression import suppress
from klbox_jax.structures import BoxPredictions, Proposals
from tests.references.detectron_voting import EDGE_ORDER, detections, overlap, vote_and_suppress
from tests.thin import random_batch, thin_model

K, SLOTS, SETS, OUTPUTS = 3, 48, 240, 40
FILE = (150, 200)  # height, width
CODER = CornerBoxCoder()
EDGES = list(EDGE_ORDER)
LAST_PIXEL = np.array([0.0, 0, 1, 1])
LEGACY = PostprocessSettings(
    suppression="soft_gaussian",
    voting="variance",
    sigma_t=0.01,
    voters="remaining",
    voting_iou_floor=0.01,
    variance_order="detectron",
    plus_one_widths=True,
    detections_per_image=OUTPUTS,
)
HARD = dataclasses.replace(LEGACY, suppression="hard")


def random_image(rng):
    """What the release's network gives of an image: RoIs of the scaled image in clusters, some at its border."""
    scale, count = rng.choice([0.5, 1.0, 2.0, 3.2]), int(rng.integers(8, SLOTS))
    height, width = np.array(FILE) * scale
    middle = rng.uniform(0, [width, height], (4, 2))[rng.integers(0, 4, count)]
    middle = middle + rng.normal(0, 4 * scale, (count, 2))
    sides = rng.uniform(6, 40, (count, 2)) * scale
    rois = np.concatenate([middle - sides, middle + sides], axis=1)
    return {
        "logits": rng.normal(0, 1.5, (count, K + 1)).astype(np.float32),
        "deltas": rng.normal(0, 0.6, (count, K, 4)).astype(np.float32),
        "log_vars": rng.uniform(-5, 3, (count, K, 4)).astype(np.float32),
        "rois": np.clip(rois, 0, [width - 1, height - 1] * 2).astype(np.float32),
        "scale": float(scale),
    }


def padded(rows, fill):
    return np.concatenate([rows, np.full((SLOTS - len(rows), *rows.shape[1:]), fill, rows.dtype)])


def as_inputs(image):
    """The same for `detect`: our order of edges, boxes that end where their last pixel ends; padding scores best."""
    predictions = BoxPredictions(
        class_logits=jnp.asarray(padded(image["logits"], 9.0)),
        box_deltas=jnp.asarray(padded(image["deltas"][..., EDGES], 0.0)),
        box_log_vars=jnp.asarray(padded(image["log_vars"][..., EDGES], -6.0)),
    )
    proposals = Proposals(
        boxes=jnp.asarray(padded(image["rois"] + LAST_PIXEL.astype(np.float32), 50.0)),
        objectness_logits=jnp.zeros(SLOTS),
        valid=jnp.arange(SLOTS) < len(image["rois"]),
    )
    scale = jnp.full(2, image["scale"], jnp.float32)
    return predictions, proposals, jnp.asarray(np.round(np.array(FILE) * image["scale"]), jnp.int32), scale


@functools.partial(jax.jit, static_argnames=("settings",))
def detect_one(predictions, proposals, image_size, scale, *, settings):
    return detect(predictions, proposals, image_size, settings=settings, box_coder=CODER, scale=scale)


@functools.cache
def images():
    rng = np.random.default_rng(0)
    return [random_image(rng) for _ in range(SETS)]


@functools.cache
def stacked_images():
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(as_inputs, images()))


@pytest.mark.parametrize("settings", [LEGACY, HARD], ids=["soft", "hard"])
def test_detections_equal_those_of_the_released_code(settings):
    several = jax.vmap(functools.partial(detect_one, settings=settings))
    found = jax.device_get(several(*stacked_images()))
    rows = same = 0
    for index, image in enumerate(images()):
        expected = detections(
            **image, image_size=FILE, soft=settings.suppression != "hard", nms=0.5, most=OUTPUTS
        )
        number = len(expected)
        assert found.valid[index].sum() == number
        wanted = {name: np.array([one[name] for one in expected]) for name in expected[0]}
        np.testing.assert_allclose(found.scores[index, :number], wanted["score"], rtol=2e-5)
        # In float32 a near tie may be picked the other way round.
        alike = (found.classes[index, :number] == wanted["class"]) & (
            found.candidate_index[index, :number] == wanted["roi"]
        )
        boxes = found.boxes[index, :number] / image["scale"] - LAST_PIXEL
        alike &= np.abs(boxes - wanted["box"]).max(axis=1) < 2e-3
        rows, same = rows + number, same + alike.sum()
    assert rows > 20 * SETS
    assert same >= 0.999 * rows


def random_candidates(rng):
    """Whole pixels in clusters, with the variances in the order of the release."""
    count = int(rng.integers(10, SLOTS))
    middle = rng.integers(60, 300, (4, 2))[rng.integers(0, 4, count)] + rng.normal(0, 5, (count, 2)).round()
    sides = rng.integers(5, 30, (count, 2))
    return {
        "boxes": np.concatenate([middle - sides, middle + sides], axis=1),
        # Far apart, so that a decayed score is no near tie.
        "scores": rng.permutation(np.arange(1, SLOTS))[:count] / SLOTS,
        "sigmas": np.exp(rng.uniform(-3, 2, (count, 4))),
    }


@functools.partial(jax.jit, static_argnames=("settings", "outputs"))
def suppress_and_vote(boxes, scores, variances, valid, *, settings, outputs):
    """One class alone."""
    rows = jnp.arange(len(scores))
    candidates = Candidates(
        boxes=boxes,
        scores=scores,
        classes=jnp.zeros_like(rows),
        proposal_index=rows,
        valid=valid,
        coded_variances=variances,
        pixel_variances=variances,
    )
    settings = dataclasses.replace(settings, detections_per_image=outputs)
    kept = suppress(candidates, settings)
    return kept, vote(kept, candidates, settings)


@pytest.mark.parametrize("settings", [LEGACY, HARD], ids=["soft", "hard"])
def test_votes_equal_those_of_the_released_code_exactly(settings):
    rng = np.random.default_rng(1)
    sets = [random_candidates(rng) for _ in range(SETS)]
    stacked = {
        name: np.stack([padded(one[name].astype(np.float64), fill) for one in sets])
        for name, fill in (("boxes", 100.0), ("scores", 0.99), ("sigmas", 0.01))
    }
    valid = np.arange(SLOTS)[None, :] < np.array([[len(one["scores"])] for one in sets])
    several = jax.vmap(functools.partial(suppress_and_vote, settings=settings, outputs=SLOTS))
    with jax.enable_x64(True):
        arrays = (
            stacked["boxes"] + LAST_PIXEL,
            stacked["scores"],
            stacked["sigmas"][..., EDGES] ** 2,
            valid,
        )
        kept, voted = jax.device_get(several(*map(jnp.asarray, arrays)))
    moved = 0
    for index, one in enumerate(sets):
        picks = vote_and_suppress(**one, soft=settings.suppression != "hard")
        rows = slice(0, len(picks))
        assert kept.valid[index].sum() == len(picks)
        np.testing.assert_array_equal(kept.indices[index, rows], [row for row, _, _ in picks])
        np.testing.assert_allclose(kept.scores[index, rows], [score for _, score, _ in picks], rtol=1e-12)
        boxes = np.stack([box for _, _, box in picks])
        np.testing.assert_allclose(voted.boxes[index, rows] - LAST_PIXEL, boxes, rtol=0, atol=1e-9)
        moved += (np.abs(boxes - one["boxes"][[row for row, _, _ in picks]]) > 0.1).any(axis=1).sum()
    assert moved > SETS / 2


def vote_by_hand(boxes, scores, settings, variances=None, outputs=2):
    """Boxes that end where their last pixel ends; variances in our order."""
    count = len(boxes)
    return suppress_and_vote(
        jnp.asarray(boxes, jnp.float32),
        jnp.asarray(scores, jnp.float32),
        jnp.ones((count, 4)) if variances is None else jnp.asarray(variances, jnp.float32),
        jnp.ones(count, bool),
        settings=settings,
        outputs=outputs,
    )


def test_the_order_of_variances_by_hand():
    # 10 x 10, the second 2 lower: 80 shared of 120, IoU 2/3. With sigma_t = 1 / (9 ln 2) its p is 1/2.
    case = {
        "boxes": [[0, 0, 10, 10], [0, 2, 10, 12]],
        "scores": [0.9, 0.5],
        "variances": [[1, 1, 1, 1], [1, 4, 2, 8]],
    }
    corners = PostprocessSettings(voting="variance", sigma_t=float(1 / (9 * np.log(2))))
    released = dataclasses.replace(corners, variance_order="detectron")
    _, own = vote_by_hand(**case, settings=corners, outputs=1)
    _, mismatched = vote_by_hand(**case, settings=released, outputs=1)
    # y1 by its own variance 4: (0 + 2/8) / (1 + 1/8) = 2/9. By that of x2, 2: (0 + 2/4) / (1 + 1/4) = 2/5.
    # y2 by its own variance 8 both times: (10 + 12/16) / (1 + 1/16) = 172/17.
    np.testing.assert_allclose(own.boxes, [[0, 2 / 9, 10, 172 / 17]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mismatched.boxes, [[0, 2 / 5, 10, 172 / 17]], rtol=1e-5, atol=1e-6)
    # What is reported for y1 is its own variance, 1 and 4, under these votes: (1 + 4/8) / (9/8) and (1 + 4/4) / (5/4).
    np.testing.assert_allclose(own.variances[0, 1], 4 / 3, rtol=1e-5)
    np.testing.assert_allclose(mismatched.variances[0, 1], 8 / 5, rtol=1e-5)


def test_the_remaining_voters_by_hand():
    # IoU of 1 with 2: 8/12, of 1 with 3: 5/15, of 2 with 3: 7/13. The first removes the second and keeps the third.
    boxes = [[0, 0, 10, 10], [2, 0, 12, 10], [5, 0, 15, 10]]
    scores = [0.9, 0.8, 0.7]
    everyone = PostprocessSettings(voting="variance", sigma_t=0.25)
    remaining = dataclasses.replace(everyone, voters="remaining")
    kept, voted = vote_by_hand(boxes, scores, remaining)
    np.testing.assert_array_equal(kept.indices, [0, 2])
    np.testing.assert_array_equal(kept.num_picks_alive, [1, 1, 2])
    # All three vote for the first, the second too, which this very pick removes.
    second, third = np.exp(-((4 / 12) ** 2) / 0.25), np.exp(-((10 / 15) ** 2) / 0.25)
    first = (2 * second + 5 * third) / (1 + second + third)
    np.testing.assert_allclose(voted.boxes[0], [first, 0, 10 + first, 10], rtol=1e-5)
    # Nobody is left to vote for the third but itself; all of Algorithm 1's B would.
    np.testing.assert_allclose(voted.boxes[1], boxes[2], rtol=1e-6)
    _, by_all = vote_by_hand(boxes, scores, everyone)
    np.testing.assert_allclose(by_all.boxes[0], voted.boxes[0], rtol=1e-6)
    assert by_all.boxes[1, 0] < 4


def test_a_winner_does_not_vote_again_and_a_dropped_box_not_at_all():
    # Soft: two boxes of IoU 2/3. The first pick has both votes, the second its own.
    narrow = dataclasses.replace(LEGACY, sigma_t=1 / 9)
    kept, voted = vote_by_hand([[0, 0, 10, 10], [2, 0, 12, 10]], [0.9, 0.5], narrow)
    assert kept.valid.all()
    p = np.exp(-1)
    np.testing.assert_allclose(voted.boxes[0, 0], 2 * p / (1 + p), rtol=1e-5)
    np.testing.assert_allclose(voted.boxes[1], [2, 0, 12, 10], rtol=1e-6)
    # Three copies: a decay of exp(-2) takes the last, 0.005, to 0.0007 and out of the second vote.
    kept, _ = vote_by_hand([[0, 0, 10, 10]] * 3, [0.9, 0.5, 0.005], LEGACY, outputs=3)
    np.testing.assert_array_equal(kept.num_picks_alive, [1, 2, 1])


def test_iou_of_whole_pixels_by_hand():
    # Ten columns each, five of them shared: 50 / 150. As continuous edges the same numbers would share 36 / 126.
    one, other = np.array([0.0, 0, 9, 9]), np.array([5.0, 0, 14, 9])
    assert overlap(one, other) == pytest.approx(1 / 3)
    pairs = jnp.asarray([one, other], jnp.float32)
    ends = jnp.asarray([one + LAST_PIXEL, other + LAST_PIXEL], jnp.float32)
    assert float(pairwise_iou(ends[:1], ends[1:])[0, 0]) == pytest.approx(1 / 3)
    assert float(pairwise_iou(pairs[:1], pairs[1:])[0, 0]) == pytest.approx(36 / 126)
    # A vote needs more than the floor.
    wide = dataclasses.replace(LEGACY, sigma_t=10.0)
    for floor, moves in ((0.01, True), (0.0102, False)):
        # IoU 0.2 / 19.8 = 0.0101
        settings = dataclasses.replace(wide, voting_iou_floor=floor)
        _, voted = vote_by_hand([[0, 0, 10, 10], [9.8, 0, 19.8, 10]], [0.9, 0.5], settings)
        assert (float(voted.boxes[0, 0]) > 1) == moves


def image_of(roi, scale, size):
    """A single certain RoI with zero offsets; of the release, as pixels of the scaled image."""
    return (
        BoxPredictions(
            class_logits=jnp.array([[9.0, 0, 0, 0]]),
            box_deltas=jnp.zeros((1, K, 4)),
            box_log_vars=jnp.zeros((1, K, 4)),
        ),
        Proposals(
            boxes=jnp.asarray([roi], jnp.float32) + jnp.asarray(LAST_PIXEL, jnp.float32)[None, :],
            objectness_logits=jnp.zeros(1),
            valid=jnp.ones(1, bool),
        ),
        jnp.array(size),
        jnp.asarray(scale, jnp.float32),
    )


def test_the_last_pixel_is_one_of_the_file_by_hand():
    # Pixels 10 to 29 of a canvas twice as large are 5 to 14.5 of the file, which end at 15.5, at 31 in the canvas.
    inputs = image_of([10, 10, 29, 29], [2.0, 2.0], [100, 200])
    found = detect_one(*inputs, settings=LEGACY)
    np.testing.assert_allclose(found.boxes[0], [10, 10, 31, 31], rtol=1e-6)
    plain = detect_one(*inputs, settings=dataclasses.replace(LEGACY, plus_one_widths=False))
    np.testing.assert_allclose(plain.boxes[0], [10, 10, 30, 30], rtol=1e-6)
    # A box beside the file keeps its nearest pixel, here of 2 by 4 of the canvas.
    found = detect_one(*image_of([300, -40, 320, -20], [2.0, 4.0], [100, 200]), settings=LEGACY)
    assert found.valid[0]
    np.testing.assert_allclose(found.boxes[0], [198, 0, 200, 4], rtol=1e-6)


def test_the_evaluation_hands_the_scale_on():
    model, batch = thin_model("loss=kl"), random_batch(size=2, canvas=(64, 96))
    batch = batch.replace(scale=np.array([[2.0, 2.0], [1.0, 1.0]], np.float32))
    boxes, proposals, _, _ = image_of([10, 10, 29, 29], [1.0, 1.0], [1, 1])
    twice = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf, leaf]))
    predictions = Predictions(boxes=twice(boxes), proposals=twice(proposals), pyramid={})
    found = jax.jit(lambda boxes: detect_batch({}, boxes, batch, model=model, settings=LEGACY))(predictions)
    # Of the files: pixels 5 to 14.5, and 10 to 29.
    np.testing.assert_allclose(found.boxes[0, 0], [5, 5, 15.5, 15.5], rtol=1e-6)
    np.testing.assert_allclose(found.boxes[1, 0], [10, 10, 30, 30], rtol=1e-6)


def test_eager_equals_compiled_and_gradients_are_finite():
    predictions, proposals, size, scale = as_inputs(images()[3])
    compiled = detect_one(predictions, proposals, size, scale, settings=LEGACY)
    eager = detect_one.__wrapped__(predictions, proposals, size, scale, settings=LEGACY)
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)

    @jax.grad
    def gradient(deltas):
        found = detect_one(predictions.replace(box_deltas=deltas), proposals, size, scale, settings=LEGACY)
        return found.boxes.sum()

    slopes = np.asarray(gradient(predictions.box_deltas))
    assert np.isfinite(slopes).all()
    assert (slopes != 0).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"voters": "none"}, r"voters must be one of all, remaining"),
        ({"variance_order": "boxes"}, r"variance_order must be one of corners, detectron"),
        ({"voting_iou_floor": 1.0}, r"voting_iou_floor must be from 0 to below 1"),
        (
            {"voters": "remaining", "suppression": "iou_guided"},
            r"set suppression to hard, soft_linear or soft_gaussian, or voters to all",
        ),
        ({"voters": "remaining", "voting": "wbf"}, r"voting='wbf'.*set voting to variance.*or voters to all"),
        ({"voters": "remaining", "voting": "bayes"}, r"voting='bayes'.*or voters to all"),
        ({"variance_order": "detectron", "voting": "bayes"}, r"or variance_order to corners"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PostprocessSettings(**fields)


@pytest.mark.parametrize("voting", ["iou", "iou_score", "box_voting"])
def test_the_remaining_voters_of_the_other_votings(voting):
    # As by hand above: nobody is left to vote for the second pick.
    boxes = [[0, 0, 10, 10], [2, 0, 12, 10], [5, 0, 15, 10]]
    scores = [0.9, 0.8, 0.7]
    settings = PostprocessSettings(voting=voting, voters="remaining", sigma_t=0.25, box_voting_threshold=0.3)
    _, voted = vote_by_hand(boxes, scores, settings)
    assert voted.boxes[0, 0] > 0.1
    np.testing.assert_allclose(voted.boxes[1], boxes[2], rtol=1e-6)
