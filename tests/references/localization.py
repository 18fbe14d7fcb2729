"""Scores lowered by the variances of the edges, one detection and one edge at a time."""

import math


def scores_by_std(detections, strength):
    """Lowered score of each detection; a detection has a `score`, a `box` and the `variance` of its edges."""
    scores = []
    for found in detections:
        x1, y1, x2, y2 = map(float, found["box"])
        width, height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
        doubt = 0.0
        for side, variance in zip((width, height, width, height), found["variance"], strict=True):
            doubt += math.sqrt(variance) / side / 4
        scores.append(found["score"] * math.exp(-strength * doubt))
    return scores
