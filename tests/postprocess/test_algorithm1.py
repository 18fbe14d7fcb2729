"""Suppression and voting together against Algorithm 1 of the paper, on a thousand random images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.postprocess.suppression import suppress
from klbox_jax.postprocess.voting import variance_voting
from tests.references.algorithm1 import algorithm1

SLOTS = 400
OUTPUTS = 60
METHODS = ("hard", "soft_linear", "soft_gaussian")
# Thresholds below and above one half, narrow and wide decays.
SETTINGS = (
    {"nms_threshold": 0.4, "linear_threshold": 0.3, "sigma": 0.5, "sigma_t": 0.02},
    {"nms_threshold": 0.7, "linear_threshold": 0.6, "sigma": 0.2, "sigma_t": 0.05},
)


def random_set(rng):
    """Boxes in clusters with whole coordinates, so that IoUs are the same fractions in any precision."""
    count = int(np.exp(rng.uniform(np.log(20), np.log(400))))
    centers = rng.integers(100, 600, (max(count // int(rng.integers(2, 15)), 1), 2))
    middle = centers[rng.integers(0, len(centers), count)] + rng.normal(0, 8, (count, 2)).round()
    sides = rng.integers(20, 90, (count, 2))
    boxes = np.concatenate([middle - sides, middle + sides], axis=1)
    duplicates = rng.random(count) < 0.1
    boxes[duplicates] = boxes[rng.integers(0, count, duplicates.sum())]
    return {
        "boxes": boxes,
        "scores": rng.integers(2, 128, count) / 128,  # many ties
        "classes": rng.integers(0, rng.integers(1, 5), count),
        # The voting weights, and what is averaged under them.
        "variances": np.exp(rng.uniform(-5, 3, (count, 4))),
        "reported": rng.uniform(1, 100, (count, 4)),
    }


@functools.cache
def random_sets(group):
    rng = np.random.default_rng(group)
    return [random_set(rng) for _ in range(500)]


def padded(sets, dtype):
    """The sets as stacked arrays; the padding overlaps real boxes and outscores them."""
    arrays = {
        "boxes": np.tile([200.0, 200, 400, 400], (len(sets), SLOTS, 1)),
        "scores": np.full((len(sets), SLOTS), 0.99),
        "classes": np.zeros((len(sets), SLOTS), np.int32),
        "variances": np.full((len(sets), SLOTS, 4), 1e-3),
        "reported": np.full((len(sets), SLOTS, 4), np.nan),
        "valid": np.zeros((len(sets), SLOTS), bool),
    }
    for row, one in enumerate(sets):
        count = len(one["scores"])
        for name, values in one.items():
            arrays[name][row, :count] = values
        arrays["valid"][row, :count] = True
    return {
        name: jnp.asarray(values, dtype if values.dtype == np.float64 else values.dtype)
        for name, values in arrays.items()
    }


# At the tests' level of optimisation the images take three times as long as now, and longer than to compile.
@functools.partial(
    jax.jit, static_argnames=("method", "group"), compiler_options={"xla_backend_optimization_level": 2}
)
def suppress_and_vote(arrays, *, method, group):
    options = SETTINGS[group]

    def one(boxes, scores, classes, variances, reported, valid):
        settings = PostprocessSettings(
            suppression=method,
            nms_threshold=options["nms_threshold"],
            soft_nms_sigma=options["sigma"],
            soft_nms_threshold=options["linear_threshold"],
            detections_per_image=OUTPUTS,
        )
        candidates = Candidates(boxes=boxes, scores=scores, classes=classes, valid=valid)
        kept = suppress(candidates, settings)
        voted = variance_voting(
            boxes[kept.indices],
            classes[kept.indices],
            boxes,
            variances,
            classes,
            valid,
            sigma_t=options["sigma_t"],
            reported_variances=reported,
        )
        return kept, voted

    return jax.vmap(one)(**arrays)


def oracle(sets, method, group):
    """The same as stacked arrays: indices, scores, boxes, variances, with -1 or 0 in unused slots."""
    indices = np.full((len(sets), OUTPUTS), -1)
    scores = np.zeros((len(sets), OUTPUTS))
    boxes, variances = np.zeros((len(sets), OUTPUTS, 4)), np.zeros((len(sets), OUTPUTS, 4))
    for row, one in enumerate(sets):
        for slot, found in enumerate(
            algorithm1(**one, method=method, max_outputs=OUTPUTS, **SETTINGS[group])
        ):
            indices[row, slot], scores[row, slot] = found["index"], found["score"]
            boxes[row, slot], variances[row, slot] = found["box"], found["variance"]
    return indices, scores, boxes, variances


@pytest.mark.parametrize("group", range(len(SETTINGS)))
@pytest.mark.parametrize("method", METHODS)
def test_equals_algorithm_1(method, group):
    sets = random_sets(group)
    indices, scores, boxes, variances = oracle(sets, method, group)
    rows = indices >= 0
    assert rows.sum(1).min() < OUTPUTS
    assert (rows.sum(1) == OUTPUTS).any()

    # Which box is best jumps at near ties of decayed scores, so the picks are compared in double precision:
    # there the sets hold exact ties and clear differences, nothing between.
    with jax.enable_x64(True):
        kept, voted = jax.device_get(suppress_and_vote(padded(sets, np.float64), method=method, group=group))
    np.testing.assert_array_equal(kept.valid, rows)
    np.testing.assert_array_equal(np.where(rows, kept.indices, -1), indices)
    np.testing.assert_allclose(kept.scores, scores, rtol=1e-12)
    np.testing.assert_allclose(voted.boxes[rows], boxes[rows], rtol=1e-11)
    np.testing.assert_allclose(voted.variances[rows], variances[rows], rtol=1e-11)

    # Single precision: hard NMS compares the same fractions and must agree pick by pick; a soft pick may swap
    # places with a near tie, which leaves the falling row of scores as it is.
    kept, voted = jax.device_get(suppress_and_vote(padded(sets, np.float32), method=method, group=group))
    np.testing.assert_array_equal(kept.valid, rows)
    np.testing.assert_allclose(kept.scores, scores, rtol=2e-5)
    same = rows & (kept.indices == indices)
    assert same.sum() >= (1 if method == "hard" else 0.999) * rows.sum()
    # Coordinates reach 700; their weighted sum is rounded at about 1e-7 of that, a few times.
    np.testing.assert_allclose(voted.boxes[same], boxes[same], atol=5e-4, rtol=0)
    np.testing.assert_allclose(voted.variances[same], variances[same], rtol=2e-5)
