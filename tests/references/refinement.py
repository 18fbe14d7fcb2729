"""Refinement of one box after the other, as the paper's Algorithm 2 lists it."""

import numpy as np


def refine_box(
    box, predict, gradient, *, num_steps=5, step_size=0.5, early_stop=0.001, degeneration_tolerance=-0.01
):
    """The places of a box on its way, the prediction at each, and why it stopped."""
    box = np.asarray(box, np.float64)
    places, predictions = [box], [predict(box)]
    for _ in range(num_steps):
        width, height = box[2] - box[0], box[3] - box[1]
        box = box + step_size * gradient(box) * np.array([width, height, width, height])
        places.append(box)
        predictions.append(predict(box))
        gain = predictions[-1] - predictions[-2]
        if gain < degeneration_tolerance:
            return places, predictions, "degenerated"
        if abs(gain) < early_stop:
            return places, predictions, "settled"
    return places, predictions, "out of steps"
