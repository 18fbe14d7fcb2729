"""Votes in float64, one kept box, one edge and one voter at a time."""

import math

import jax.numpy as jnp
import numpy as np

from tests.references.boxes import iou_of_pair


def crowded_case(seed, *, slots=60, count=48):
    """Arguments of a vote: crowds of three classes with ties and duplicates; padding anywhere, no numbers in it.

    The last three kept boxes are no candidates: one that moved, one of a class that nobody has, a padded slot.
    """
    rng = np.random.default_rng(seed)
    crowd = rng.integers(0, slots // 8, slots)
    middle = rng.uniform(120, 400, (slots // 8, 2))[crowd] + rng.normal(0, 3, (slots, 2))
    sides = rng.uniform(25, 50, (slots // 8, 2))[crowd] * rng.uniform(0.85, 1.15, (slots, 2))
    boxes = (np.concatenate([middle - sides / 2, middle + sides / 2], axis=1) * 2).round() / 2
    duplicates = rng.random(slots) < 0.15
    boxes[duplicates] = boxes[rng.integers(0, slots, duplicates.sum())]
    valid = np.zeros(slots, bool)
    valid[rng.permutation(slots)[:count]] = True
    case = {
        "boxes": boxes.astype(np.float32),
        "scores": (rng.integers(1, 32, slots) / 32).astype(np.float32),
        "classes": rng.integers(0, 3, slots).astype(np.int32),
        "valid": valid,
        "variances": np.exp(rng.uniform(-5, 3, (slots, 4))).astype(np.float32),
        "reported": rng.uniform(1, 100, (slots, 4)).astype(np.float32),
    }
    kept = rng.choice(np.flatnonzero(valid), 10, replace=False)
    others = np.stack([case["boxes"][kept[0]] + 2, case["boxes"][kept[1]], np.zeros(4)])
    case["kept_boxes"] = np.concatenate([case["boxes"][kept], others]).astype(np.float32)
    case["kept_classes"] = np.append(case["classes"][kept], [case["classes"][kept[0]], 7, 0]).astype(np.int32)
    case["kept_variances"] = np.concatenate([case["reported"][kept], np.full((3, 4), 5, np.float32)])
    for name, rubbish in (
        ("boxes", np.nan),
        ("scores", np.inf),
        ("variances", np.nan),
        ("reported", -np.inf),
    ):
        case[name][~valid] = rubbish
    return case


def on_device(case):
    return {
        name: jnp.asarray(values, jnp.float32 if values.dtype.kind == "f" else None)
        for name, values in case.items()
    }


def weight_of_vote(method, iou, edge, voter, *, sigma_t=0.02, iou_threshold=0.5):
    """Weight of one voter for one edge; `voter` holds its score and the variances of its edges."""
    p = math.exp(-((1 - iou) ** 2) / sigma_t) if iou > 0 else 0.0
    if method == "variance":
        return p / voter["variances"][edge]
    if method == "variance_score":
        return p * voter["score"] / voter["variances"][edge]
    if method == "iou":
        return p
    if method == "iou_score":
        return p * voter["score"]
    if method == "box_voting":
        return voter["score"] if iou >= iou_threshold else 0.0
    raise ValueError(method)


def vote_weights(method, case, **options):
    """The weight of every candidate for every edge of every kept box."""
    weights = np.zeros((len(case["kept_boxes"]), len(case["boxes"]), 4))
    for kept, kept_box in enumerate(case["kept_boxes"]):
        for row, box in enumerate(case["boxes"]):
            if case["valid"][row] and case["classes"][row] == case["kept_classes"][kept]:
                voter = {"score": float(case["scores"][row]), "variances": case["variances"][row]}
                iou = iou_of_pair(kept_box, box)
                for edge in range(4):
                    weights[kept, row, edge] = weight_of_vote(method, iou, edge, voter, **options)
    return weights


def weighted_mean(weights, case, mode):
    """Boxes and variances under `weights`; unchanged, with variance 0, where all are 0."""
    boxes = np.array(case["kept_boxes"], np.float64)
    variances = np.zeros_like(boxes)
    for kept in range(len(boxes)):
        for edge in range(4):
            voters = [row for row in range(len(case["boxes"])) if weights[kept, row, edge] > 0]
            if not voters:
                continue
            total = math.fsum(weights[kept, row, edge] for row in voters)
            shares = {row: weights[kept, row, edge] / total for row in voters}
            boxes[kept, edge] = math.fsum(shares[row] * float(case["boxes"][row][edge]) for row in voters)
            own = {row: float(case["reported"][row][edge]) for row in voters}
            if mode == "average":
                variances[kept, edge] = math.fsum(shares[row] * own[row] for row in voters)
            elif mode == "fused":
                variances[kept, edge] = math.fsum(shares[row] ** 2 * own[row] for row in voters)
            elif mode == "winner":
                variances[kept, edge] = case["kept_variances"][kept][edge]
    return boxes, variances


def sampled_variances(weights, boxes, variances, *, draws, seed):
    """Variance of the weighted mean of independent Gaussian boxes, by drawing them."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(boxes, np.sqrt(variances), (draws, *np.shape(boxes)))
    shares = weights / weights.sum(axis=1, keepdims=True)
    return np.einsum("dne,sne->sde", shares, samples).var(axis=0)
