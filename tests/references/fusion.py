"""BayesOD as one measurement after another, and weighted boxes fusion as lists of members; float64."""

import math

import numpy as np

from tests.references.boxes import iou_of_pair


def cluster_around(center, center_class, case, affinity):
    return [
        row
        for row in range(len(case["boxes"]))
        if case["valid"][row]
        and case["classes"][row] == center_class
        and iou_of_pair(center, case["boxes"][row]) > affinity
    ]


def filtered(measurements, variances):
    """Mean and variance after one measurement at a time, updated like a Kalman filter."""
    mean, variance = float(measurements[0]), float(variances[0])
    for measured, noise in zip(measurements[1:], variances[1:], strict=True):
        gain = variance / (variance + float(noise))
        mean, variance = mean + gain * (float(measured) - mean), (1 - gain) * variance
    return mean, variance


def bayes(case, *, affinity, mode, calibration=1.0):
    """Boxes and variances of the clusters around the kept boxes; `case["variances"]` are those of the measurements."""
    boxes = np.array(case["kept_boxes"], np.float64)
    variances = np.zeros_like(boxes)
    for kept in range(len(boxes)):
        members = cluster_around(case["kept_boxes"][kept], case["kept_classes"][kept], case, affinity)
        for edge in range(4) if members else ():
            own = [case["variances"][row][edge] for row in members]
            boxes[kept, edge], variance = filtered([case["boxes"][row][edge] for row in members], own)
            # The average under weights 1 / var is the harmonic mean: the fused variance, times the members.
            variances[kept, edge] = {
                "average": len(members) * variance,
                "fused": calibration * variance,
                "winner": case["kept_variances"][kept][edge],
            }[mode]
    return boxes, variances


def weighted_boxes(boxes, scores, classes, valid, *, iou_threshold):
    """Clusters as dicts of `members` (rows in the order of joining), `box`, `score` and `class`, oldest first."""
    rows = sorted((row for row in range(len(boxes)) if valid[row]), key=lambda row: -scores[row])
    clusters = []
    for row in rows:
        best, best_iou = None, iou_threshold
        for cluster in clusters:
            if cluster["class"] == classes[row]:
                iou = iou_of_pair(cluster["box"], boxes[row])
                if iou > best_iou:
                    best, best_iou = cluster, iou
        if best is None:
            best = {"class": classes[row], "members": []}
            clusters.append(best)
        best["members"].append(row)
        total = math.fsum(float(scores[member]) for member in best["members"])
        best["score"] = total / len(best["members"])
        best["box"] = [
            math.fsum(float(scores[member]) * float(boxes[member][edge]) for member in best["members"])
            / total
            for edge in range(4)
        ]
    return clusters
