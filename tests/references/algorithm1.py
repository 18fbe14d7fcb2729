"""Algorithm 1 of the KL-Loss paper (He et al., CVPR 2019) in float64 NumPy: class by class, pick by pick.

Each class runs until no box is left. Then the classes are merged by score, and the list is cut.
"""

import numpy as np


def iou_matrix(boxes):
    x1, y1, x2, y2 = np.asarray(boxes, np.float64).T
    width = np.minimum.outer(x2, x2) - np.maximum.outer(x1, x1)
    height = np.minimum.outer(y2, y2) - np.maximum.outer(y1, y1)
    inter = np.where((width > 0) & (height > 0), width * height, 0.0)
    areas = (x2 - x1) * (y2 - y1)
    return inter / (areas[:, None] + areas[None, :] - inter)


def decay_factors(iou, method, *, nms_threshold, sigma, linear_threshold):
    if method == "hard":
        return np.where(iou > nms_threshold, 0.0, 1.0)
    if method == "soft_linear":
        return np.where(iou >= linear_threshold, 1 - iou, 1.0)
    return np.exp(-(iou**2) / sigma)


def vote(row, boxes, variances, iou, sigma_t, reported):
    """One pass of lines `idx` to `b_m` of the algorithm over B, all boxes of the class."""
    members = np.flatnonzero(iou[row] > 0)
    p = np.exp(-((1 - iou[row, members]) ** 2) / sigma_t)
    weights = p[:, None] / variances[members]
    box = (weights * boxes[members]).sum(0) / weights.sum(0)
    variance = (weights * reported[members]).sum(0) / weights.sum(0)
    return box, variance


def algorithm1(
    boxes,
    scores,
    classes,
    *,
    method,
    max_outputs,
    nms_threshold=0.5,
    sigma=0.5,
    linear_threshold=0.3,
    min_score=0.001,
    variances=None,
    sigma_t=0.02,
    reported=None,
):
    """Detections, best first: dicts of index, score, class and, with `variances`, box and variance.

    All rows are real boxes; there is no padding.
    """
    boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
    if variances is not None:
        variances = np.asarray(variances, np.float64)
        reported = variances if reported is None else np.asarray(reported, np.float64)
    picks = []
    for category in sorted(set(np.asarray(classes).tolist())):
        members = np.flatnonzero(np.asarray(classes) == category)
        iou = iou_matrix(boxes[members])
        factors = decay_factors(
            iou, method, nms_threshold=nms_threshold, sigma=sigma, linear_threshold=linear_threshold
        )
        current = scores[members].copy()
        while current.size:
            best = int(np.argmax(current))
            score = current[best]
            if score <= 0 or (method != "hard" and score < min_score):
                break
            picks.append((-score, int(members[best]), best, category))
            current = current * factors[best]
            current[best] = -1.0
    picks.sort(key=lambda pick: pick[:2])

    detections, matrices = [], {}
    for negative_score, index, local, category in picks[:max_outputs]:
        detection = {"index": index, "score": -negative_score, "class": category}
        if variances is not None:
            members = np.flatnonzero(np.asarray(classes) == category)
            if category not in matrices:
                matrices[category] = iou_matrix(boxes[members])
            detection["box"], detection["variance"] = vote(
                local, boxes[members], variances[members], matrices[category], sigma_t, reported[members]
            )
        detections.append(detection)
    return detections
