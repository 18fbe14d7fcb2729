"""Soft-NMS and variance voting of 1,000 candidates of 80 classes, against Algorithm 1 as a loop in NumPy.

The loop is the paper's, line by line: every pick of every class votes at once, and classes are merged and cut at the
end. (The reference of the tests votes only for the boxes that remain after the cut, in a tenth of the time.)
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.measure import Sides, timed
from klbox_jax.postprocess.candidates import Candidates
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.postprocess.suppression import suppress
from klbox_jax.postprocess.voting import variance_voting

CANDIDATES, CLASSES, OBJECTS, OUTPUTS = 1000, 80, 50, 100
# Calls of ours in a row: one takes less than a millisecond.
CALLS = 20
SIGMA_T, SOFT_NMS_SIGMA, MIN_SCORE = 0.02, 0.5, 0.001


def make_candidates(seed: int) -> dict[str, np.ndarray]:
    """Returns the candidates of an image: twenty around each of fifty objects, of the object's class."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(16), np.log(300), (OBJECTS, 2)))
    corners = rng.uniform(size=sides.shape) * (640 - sides)
    objects = np.concatenate([corners, corners + sides], axis=1)
    classes = rng.integers(0, CLASSES, OBJECTS)
    row = np.arange(CANDIDATES) % OBJECTS
    noise = rng.normal(0, 0.08, (CANDIDATES, 4)) * np.tile(sides[row], 2)
    return {
        "boxes": (objects[row] + noise).astype(np.float32),
        "scores": rng.uniform(0.05, 1.0, CANDIDATES).astype(np.float32),
        "classes": classes[row].astype(np.int32),
        "variances": np.exp(rng.uniform(-7, 0, (CANDIDATES, 4))).astype(np.float32),
    }


def algorithm_1(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, variances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and boxes of the best detections, by Algorithm 1 of He et al. 2019 with Gaussian soft-NMS."""
    found = []
    for category in np.unique(classes):
        members = classes == category
        everyone, spreads = boxes[members], variances[members]
        queue, current = everyone, scores[members]
        while len(queue):
            best = np.argmax(current)
            box, score = queue[best], current[best]
            if score < MIN_SCORE:
                break
            overlap = _iou(box, everyone)
            weights = np.exp(-((1 - overlap) ** 2) / SIGMA_T)[:, None] / spreads
            weights[overlap <= 0] = 0
            found.append((score, *(weights * everyone).sum(axis=0) / weights.sum(axis=0)))
            queue, current = np.delete(queue, best, axis=0), np.delete(current, best)
            current = current * np.exp(-(_iou(box, queue) ** 2) / SOFT_NMS_SIGMA)
    rows = np.array(sorted(found, key=lambda row: -row[0])[:OUTPUTS])
    return rows[:, 0], rows[:, 1:]


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    shared = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    intersection = np.prod(np.maximum(shared, 0.0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return intersection / (np.prod(box[2:] - box[:2]) + areas - intersection)


def suppress_and_vote(boxes, scores, classes, variances):
    """Returns scores and boxes of an image's detections, those of Algorithm 1."""
    valid = jnp.ones(CANDIDATES, bool)
    settings = PostprocessSettings(
        suppression="soft_gaussian",
        soft_nms_sigma=SOFT_NMS_SIGMA,
        soft_nms_min_score=MIN_SCORE,
        detections_per_image=OUTPUTS,
    )
    kept = suppress(Candidates(boxes=boxes, scores=scores, classes=classes, valid=valid), settings)
    voted = variance_voting(
        boxes[kept.indices], classes[kept.indices], boxes, variances, classes, valid, sigma_t=SIGMA_T
    )
    return kept.scores, voted.boxes


def sides(batch: int) -> Sides:
    """Returns ours on a batch of images at once, timed for one of them, and the loop on one image."""
    images = [make_candidates(seed) for seed in range(batch)]

    run = jax.jit(jax.vmap(suppress_and_vote))
    stacked = jax.device_put({name: np.stack([image[name] for image in images]) for name in images[0]})
    for scores, boxes, image in zip(*jax.device_get(run(**stacked)), images, strict=True):
        expected_scores, expected_boxes = algorithm_1(**image)
        # Nearly equal decayed scores may be in another order, and so may a few boxes.
        same = np.abs(boxes - expected_boxes).max(axis=1) < 0.01
        if same.mean() < 0.9 or np.abs(scores - expected_scores).max() > 1e-4:
            raise ValueError("soft-NMS and voting differ from Algorithm 1, so that their time means nothing")
    turn = itertools.cycle(images)
    return Sides(
        ours=timed(lambda: jax.block_until_ready(run(**stacked)), calls=CALLS, share=1 / batch),
        peer=timed(lambda: algorithm_1(**next(turn))),
    )
