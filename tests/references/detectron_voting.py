"""The KL-Loss release from the head's outputs to detections, one class and one pick after the other, in float64.

It keeps the conventions of the release: whole pixels of the file, offsets and log variances ordered x1, x2, y1, y2,
boxes ordered x1, y1, x2, y2.
"""

import numpy as np

EDGE_ORDER = (0, 2, 1, 3)  # of x1, x2, y1, y2 among x1, y1, x2, y2


def decode(rois, deltas, scale, image_size):
    """Boxes `[R, K, 4]` of the file: the RoIs are scaled to it first, and every side is a pixel longer."""
    height, width = image_size
    boxes = np.zeros(deltas.shape)
    for r, roi in enumerate(np.asarray(rois, np.float64) / scale):
        wide, high = roi[2] - roi[0] + 1, roi[3] - roi[1] + 1
        for k, (left, right, down, up) in enumerate(np.clip(deltas[r] / 10, -62.5, 62.5)):
            x1, x2 = roi[0] + left * wide, roi[2] + right * wide
            y1, y2 = roi[1] + down * high, roi[3] + up * high
            boxes[r, k] = np.clip([x1, y1, x2, y2], 0, [width - 1, height - 1, width - 1, height - 1])
    return boxes


def overlap(one, other):
    """IoU of two boxes of whole pixels."""
    wide = min(one[2], other[2]) - max(one[0], other[0]) + 1
    high = min(one[3], other[3]) - max(one[1], other[1]) + 1
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    return wide * high / (areas[0] + areas[1] - wide * high)


def overlaps(boxes):
    x1, y1, x2, y2 = np.asarray(boxes, np.float64).T
    wide = np.maximum(np.minimum.outer(x2, x2) - np.maximum.outer(x1, x1) + 1, 0)
    high = np.maximum(np.minimum.outer(y2, y2) - np.maximum.outer(y1, y1) + 1, 0)
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    return wide * high / (areas[:, None] + areas[None, :] - wide * high)


def vote_and_suppress(boxes, scores, sigmas, *, soft, nms=0.5, iou_sigma=0.01, floor=0.01):
    """Picks of one class, in order: row, score and voted box; column k of `sigmas` belongs to column k of `boxes`."""
    boxes, sigmas = np.asarray(boxes, np.float64), np.asarray(sigmas, np.float64)
    iou, scores = overlaps(boxes), np.array(scores, np.float64)
    queue, picks = list(range(len(boxes))), []
    while queue:
        best = max(queue, key=lambda row: (scores[row], -row))
        numerator, denominator = np.zeros(4), np.zeros(4)
        for row in queue:
            if iou[best, row] > floor:
                p = np.exp(-((1 - iou[best, row]) ** 2) / iou_sigma)
                for column in range(4):
                    numerator[column] += p * boxes[row, column] / sigmas[row, column] ** 2
                    denominator[column] += p / sigmas[row, column] ** 2
        picks.append((best, scores[best], numerator / denominator))
        queue.remove(best)
        for row in list(queue):
            if soft:
                scores[row] *= np.exp(-(iou[best, row] ** 2) / 0.5)
            elif iou[best, row] > nms:
                scores[row] = 0
            if scores[row] < 0.001:
                queue.remove(row)
    return picks


def detections(logits, deltas, log_vars, rois, *, scale, image_size, soft, nms=0.5, most=100):
    """Detections of an image, best first: dicts of score, class, RoI and box; the background is the last logit."""
    exps = np.exp(np.asarray(logits, np.float64))
    scores = exps / exps.sum(axis=1, keepdims=True)
    boxes = decode(rois, np.asarray(deltas, np.float64), scale, image_size)
    sigmas = np.exp(np.asarray(log_vars, np.float64) / 2)
    found = []
    for k in range(scores.shape[1] - 1):
        rows = np.flatnonzero(scores[:, k] > 0.05)
        for row, score, box in vote_and_suppress(
            boxes[rows, k], scores[rows, k], sigmas[rows, k], soft=soft, nms=nms
        ):
            found.append({"score": score, "class": k, "roi": rows[row], "box": box})
    return sorted(found, key=lambda one: -one["score"])[:most]
