import json

import numpy as np
import pytest

from klbox_jax.evaluation.conformal import fit_intervals, interval_scales
from klbox_jax.evaluation.interval_scores import summarize_intervals
from klbox_jax.evaluation.width_model import (
    EXPONENTS,
    WidthModel,
    cross_fitted_widths,
    fit_width_model,
)


def drawn(seed, *, num_images=150, exponent=0.5):
    """Errors of Laplace's distribution: (1.2 - score) side^exponent, twice as large in class 7 and for x2 and y2."""
    rng = np.random.default_rng(seed)
    image_ids = np.repeat(np.arange(num_images), rng.integers(1, 8, num_images))
    n = len(image_ids)
    corner, sides = rng.uniform(0, 300, (n, 2)), np.exp(rng.normal(4, 0.8, (n, 2)))
    boxes, scores = np.concatenate([corner, corner + sides], axis=1), rng.uniform(0.1, 1, n)
    classes = np.where(rng.random(n) < 0.3, 7, 2)
    widths = 0.4 * (1.2 - scores)[:, None] * np.tile(sides, 2) ** exponent
    widths = widths * np.where(classes == 7, 2.0, 1.0)[:, None] * [1.0, 1, 2, 2]
    return rng.laplace(0, widths), boxes, scores, classes, image_ids, widths


def test_widths_of_a_known_model_are_found():
    *matches, _ = drawn(0, num_images=600)
    model = fit_width_model(*matches)
    assert model.exponent == 0.5
    _, boxes, scores, classes, _, expected = drawn(1)
    found = model.widths(boxes, scores, classes)
    ratios = np.log(found / expected)[(scores > 0.15) & (scores < 0.95)]
    assert np.abs(ratios).mean() < 0.12
    assert np.abs(ratios.mean(axis=0)).max() < 0.08
    np.testing.assert_allclose(model.class_factors[7] / model.class_factors[2], 2, rtol=0.25)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_the_exponent_is_chosen_on_images_left_out(exponent):
    *matches, _ = drawn(2, num_images=500, exponent=exponent)
    assert fit_width_model(*matches).exponent == pytest.approx(exponent, abs=0.25)


def test_widths_fall_with_the_score_and_grow_with_the_side():
    *matches, _ = drawn(3, num_images=40)
    model = fit_width_model(*matches)
    scores = np.linspace(0, 1, 101)
    widths = model.widths(np.tile([10.0, 10, 60, 90], (101, 1)), scores, np.full(101, 2))
    assert (np.diff(widths, axis=0) <= 0).all()
    assert (widths[0] > widths[-1]).all()
    sides = np.arange(5.0, 200)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    assert (np.diff(model.widths(boxes, np.full(195, 0.5), np.full(195, 7)), axis=0) >= 0).all()


def test_a_small_class_is_drawn_to_all_and_an_unknown_one_is_theirs():
    errors, boxes, scores, classes, images, _ = drawn(4)
    classes[0], errors[0] = 99, 1000.0
    model = fit_width_model(errors, boxes, scores, classes, images)
    # One label among 20 of the prior: a ratio r gives (r + 20) / 21 at most, times the factor of all.
    ratio = model.class_factors[99] / model.edge_factors
    alone = 1000 / model.widths(boxes[:1], scores[:1], [12345])[0]
    np.testing.assert_allclose(ratio, (alone + 20) / 21)
    np.testing.assert_allclose(
        model.widths(boxes[:1], scores[:1], [12345]) * ratio, model.widths(boxes[:1], scores[:1], [99])
    )


def test_cross_fitted_widths_do_not_see_their_image():
    *matches, _ = drawn(5, num_images=30)
    widths = cross_fitted_widths(*matches)
    assert (widths > 0).all()
    errors, _, _, _, images = matches
    for image in (0, 17):
        own = images == image
        spoilt = errors.copy()
        spoilt[own] *= 50
        again = cross_fitted_widths(spoilt, *matches[1:])
        np.testing.assert_array_equal(again[own], widths[own])
        assert (again[~own] != widths[~own]).any()


def test_intervals_of_fitted_widths_are_narrower_and_keep_their_coverage():
    coverages, scaled, others = [], [], []
    for seed in range(6):
        errors, boxes, scores, classes, images, _ = drawn(100 + seed, num_images=80)
        model = fit_width_model(errors, boxes, scores, classes, images)
        widths = cross_fitted_widths(errors, boxes, scores, classes, images)
        fitted = fit_intervals(errors, widths, images, coverage=0.9)
        new_errors, new_boxes, new_scores, new_classes, new_images, _ = drawn(200 + seed)
        half = fitted.half_widths(model.widths(new_boxes, new_scores, new_classes))
        found = summarize_intervals(new_errors, half, half, new_images, coverage=0.9)
        coverages.append(found["coverage"])
        scaled.append(found["interval_score"])
        best = []
        for score in ("additive", "multiplicative"):
            plain = fit_intervals(errors, interval_scales(score, boxes), images, coverage=0.9)
            half = plain.half_widths(interval_scales(score, new_boxes))
            best.append(
                summarize_intervals(new_errors, half, half, new_images, coverage=0.9)["interval_score"]
            )
        others.append(min(best))
    assert np.mean(coverages) == pytest.approx(0.9, abs=0.02)
    assert np.mean(scaled) < 0.8 * np.mean(others)


def test_a_model_survives_json():
    *matches, _ = drawn(6, num_images=20)
    model = fit_width_model(*matches)
    again = WidthModel.from_dict(json.loads(json.dumps(model.to_dict(), allow_nan=False)))
    _, boxes, scores, classes, _ = matches
    np.testing.assert_array_equal(again.widths(boxes, scores, classes), model.widths(boxes, scores, classes))
    assert again.to_dict() == model.to_dict()


def test_errors_of_zero_and_few_labels_give_positive_widths():
    boxes = np.tile([0.0, 0, 9, 9], (2, 1))
    model = fit_width_model(np.zeros((2, 4)), boxes, [0.5, 0.6], [1, 1], ["a", "b"])
    np.testing.assert_array_equal(model.widths(boxes, [0.1, 0.9], [1, 2]), np.full((2, 4), 0.01))
    assert (cross_fitted_widths(np.ones((2, 4)), boxes, [0.5, 0.6], [1, 1], ["a", "b"]) > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errors": [], "boxes": [], "scores": [], "classes": [], "images": []}, "no matched detection"),
        ({"images": ["a", "a"]}, "there is one image; give two or more"),
        ({"boxes": [[0, 0, 1, 1]]}, "boxes has 1 rows, not 2"),
        ({"scores": [0.5, np.nan]}, r"scores\[1\] = nan is not finite"),
        ({"classes": [1.5, 2.0]}, "classes must be whole numbers"),
    ],
)
def test_bad_input_ends_in_one_line(changes, message):
    arguments = {
        "errors": np.ones((2, 4)), "boxes": np.tile([0.0, 0, 9, 9], (2, 1)), "scores": [0.5, 0.6],
        "classes": [1, 2], "images": ["a", "b"],
    } | changes  # fmt: skip
    for function in (fit_width_model, cross_fitted_widths):
        with pytest.raises(ValueError, match=message) as error:
            function(*arguments.values())
        assert "\n" not in str(error.value)
