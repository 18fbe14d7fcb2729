import json
import math
from fractions import Fraction

import numpy as np
import pytest

from klbox_jax.evaluation.conformal import (
    LEVELS,
    MULTIPLICITIES,
    fit_intervals,
    interval_scales,
    split_images,
)
from klbox_jax.evaluation.conformal_quantiles import (
    conformal_rank,
    exact_fraction,
    labels_needed,
    max_rank_bounds,
)
from klbox_jax.evaluation.intervals import Intervals, outer_and_inner_boxes
from tests.references import conformal as reference


def drawn(seed, n=60, *, images=15):
    """Heavy-tailed errors of correlated edges in units of scales, each box in an image."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(0, 1, (n, 4)))
    common = rng.standard_t(3, (n, 1))
    errors = scales * (0.7 * common + rng.standard_t(3, (n, 4)))
    image_ids = np.concatenate([np.arange(images), rng.integers(0, images, n - images)])
    return errors, scales, image_ids


@pytest.mark.parametrize(
    ("n", "coverage", "rank"),
    [(9, 0.9, 9), (99, 0.9, 90), (4, 0.8, 4), (19, 0.95, 19), (9, 0.1 * 9, 9), (9, 1 - 0.7, 3)],
)
def test_ranks_are_whole_numbers_of_the_decimal_coverage(n, coverage, rank):
    assert conformal_rank(n, exact_fraction(coverage)) == rank
    # The rank of 1, 2, ..., n is its value.
    errors = np.tile(np.arange(1.0, n + 1)[:, None], (1, 4))
    fitted = fit_intervals(errors, np.ones((n, 4)), np.arange(n), coverage=coverage)
    np.testing.assert_array_equal(fitted.half_widths(np.ones((1, 4))), np.full((1, 4), rank))


@pytest.mark.parametrize("coverage", ["0.5", "0.8", "0.9", "0.95", "0.99", "0.123"])
def test_ranks_agree_with_decimal_arithmetic(coverage):
    for n in [*range(1, 60), 79, 99, 199, 299, 999]:
        exact = exact_fraction(float(coverage))
        assert conformal_rank(n, exact) == reference.rank(n, coverage)
        shared = str(1 - (1 - Fraction(coverage)) / 4)
        assert Fraction(conformal_rank(n, exact, multiplicity="bonferroni"), n + 1) >= Fraction(shared)
        sidak = conformal_rank(n, exact, multiplicity="sidak")
        assert Fraction(sidak, n + 1) ** 4 >= Fraction(coverage) > Fraction(sidak - 1, n + 1) ** 4
        both = conformal_rank(n, exact, multiplicity="sidak", asymmetric=True)
        inside = [1 - 2 * (1 - Fraction(k, n + 1)) for k in (both, both - 1)]
        assert inside[0] ** 4 >= exact
        assert inside[1] < 0 or inside[1] ** 4 < exact


@pytest.mark.parametrize(
    ("multiplicity", "asymmetric", "needed"),
    [
        ("max", False, 9),
        ("max", True, 19),
        ("edge", False, 9),
        ("bonferroni", False, 39),
        ("bonferroni", True, 79),
        ("sidak", False, 38),
        ("max_rank", False, 39),
    ],
)
def test_one_label_less_than_needed_gives_infinite_intervals(multiplicity, asymmetric, needed):
    # .9 of a box: 9 / 10; .975 of an edge: 39 / 40; (38 / 39)^4 = .9013, (37 / 38)^4 = .8988.
    choices = {"coverage": 0.9, "multiplicity": multiplicity, "asymmetric": asymmetric}
    rng = np.random.default_rng(0)
    errors = rng.normal(size=(needed, 4))
    ones, images = np.ones((needed, 4)), np.arange(needed)
    enough = fit_intervals(errors, ones, images, **choices)
    assert enough.labels_needed == needed
    assert np.isfinite(enough.factors).all()
    assert enough.warning() is None
    fewer = fit_intervals(errors[1:], ones[1:], images[1:], **choices)
    assert np.isposinf(fewer.half_widths(ones)).all()
    assert f"needs {needed} calibration labels and there are {needed - 1}" in fewer.warning()
    text = json.dumps(fewer.to_dict(), allow_nan=False)
    assert json.loads(text)["factors"] == [[None] * 4] * 2
    assert np.isposinf(Intervals.from_dict(json.loads(text)).factors).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("coverage", ["0.5", "0.8", "0.9"])
def test_quantiles_agree_with_plain_loops(seed, coverage):
    errors, scales, images = drawn(seed, n=40 + seed)
    k = reference.rank(len(errors), coverage)
    largest = reference.largest_ratios(errors.tolist(), scales.tolist())
    fitted = fit_intervals(errors, scales, images, coverage=float(coverage))
    np.testing.assert_array_equal(fitted.factors, np.full((2, 4), reference.quantile(largest, k)))
    np.testing.assert_array_equal(fitted.half_widths(scales), fitted.factors[0] * scales)
    by_edge = fit_intervals(errors, scales, images, coverage=float(coverage), multiplicity="edge")
    for edge in range(4):
        ratios = (np.abs(errors[:, edge]) / scales[:, edge]).tolist()
        assert by_edge.factors[0, edge] == by_edge.factors[1, edge] == reference.quantile(ratios, k)


@pytest.mark.parametrize("missed_share", [0.0, 0.2, 0.5])
def test_images_agree_with_plain_loops(missed_share):
    errors, scales, images = drawn(1, n=80, images=20)
    largest = reference.largest_ratios(errors.tolist(), scales.tolist())
    bounds = [
        reference.bound_of_image(values, Fraction(str(missed_share)))
        for values in reference.by_image(largest, images.tolist())
    ]
    fitted = fit_intervals(errors, scales, images, coverage=0.8, level="image", missed_share=missed_share)
    assert fitted.factors[0, 0] == reference.quantile(bounds, reference.rank(20, "0.8"))
    assert (fitted.num_labels, fitted.num_images, fitted.labels_needed) == (80, 20, 4)


@pytest.mark.parametrize("coverage", ["0.6", "0.8", "0.9", "0.96"])
def test_risk_control_agrees_with_a_search(coverage):
    for seed in range(3):
        errors, scales, images = drawn(seed, n=70, images=19)
        largest = reference.largest_ratios(errors.tolist(), scales.tolist())
        fitted = fit_intervals(errors, scales, images, coverage=float(coverage), level="image_mean")
        found = reference.risk_bound(largest, images.tolist(), 1 - Fraction(coverage))
        assert fitted.factors[0, 0] == found
    assert (found == math.inf) == (coverage == "0.96")  # 1 / 20 is above .04


def test_risk_control_is_exact_at_equality():
    # 9 images of 3 boxes, risk 0.2: a budget of 0.2 * 10 - 1 = 1 image, three boxes of one third each. In floats
    # (1/3 + 1/3 + 1/3 - 1) may fall on either side.
    errors = np.tile(np.arange(1.0, 28)[:, None], (1, 4))
    fitted = fit_intervals(
        errors, np.ones((27, 4)), np.repeat(np.arange(9), 3), coverage=0.8, level="image_mean"
    )
    assert fitted.factors[0, 0] == 24


@pytest.mark.parametrize("k", [3, 4, 5, 6])
def test_max_rank_is_the_hull_of_all_accepted_rows(k):
    rng = np.random.default_rng(k)
    for width in (1, 2, 3):
        rows = rng.normal(size=(6, width)) + rng.normal(size=(6, 1))
        places = reference.max_rank_places(rows.tolist(), k)
        ordered = np.sort(rows, axis=0)
        expected = [ordered[p - 1, c] if p <= 6 else np.inf for c, p in enumerate(places)]
        np.testing.assert_array_equal(max_rank_bounds(rows, k), expected)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("multiplicity", ["max", "edge", "bonferroni", "sidak"])
def test_the_labels_needed_are_the_first_count_whose_rank_is_within(multiplicity, asymmetric):
    for coverage in (0.05, 0.5, 0.7, 0.9, 0.95):
        choices = {"multiplicity": multiplicity, "asymmetric": asymmetric}
        exact = exact_fraction(coverage)
        first = next(n for n in range(1, 1000) if conformal_rank(n, exact, **choices) <= n)
        assert labels_needed(exact, **choices) == first


def test_asymmetric_keeps_outward_and_inward_errors_apart():
    # Labels are larger than the predictions: x1 and y1 by 1 to 19 to the left, x2 and y2 by as much to the right.
    outward = np.arange(1.0, 20)[:, None]
    errors = outward * [-1, -1, 1, 1]
    ones = np.ones((19, 4))
    fitted = fit_intervals(errors, ones, np.arange(19), coverage=0.9, asymmetric=True)
    lower, upper = fitted.half_widths(ones[:1])
    # ceil(20 * .95) = 19: the largest outward error is 19, the largest inward one -1.
    np.testing.assert_array_equal(lower, [[19, 19, -1, -1]])
    np.testing.assert_array_equal(upper, [[-1, -1, 19, 19]])
    both = fit_intervals(errors, ones, np.arange(19), coverage=0.9)
    np.testing.assert_array_equal(both.half_widths(ones[:1]), np.full((1, 4), 18))


@pytest.mark.parametrize("multiplicity", MULTIPLICITIES)
def test_asymmetric_bounds_sides_of_every_edge(multiplicity):
    errors, scales, images = drawn(2, n=200)
    errors += scales * [0.5, 0, -0.5, 1]
    fitted = fit_intervals(
        errors, scales, images, coverage=0.8, multiplicity=multiplicity, asymmetric=True, level="class",
        classes=np.repeat([3, 9], 100),
    )  # fmt: skip
    lower, upper = fitted.half_widths(scales, np.repeat([3, 9], 100))
    assert (lower + upper > 0).all()
    inside = (errors >= -lower) & (errors <= upper)
    inside = inside if multiplicity == "edge" else inside.all(axis=1)
    assert (inside[:100].mean(axis=0) >= 0.8).all()
    assert (inside[100:].mean(axis=0) >= 0.8).all()
    flipped = fit_intervals(
        -errors[:, [2, 3, 0, 1]], scales[:, [2, 3, 0, 1]], images, coverage=0.8, asymmetric=True,
        multiplicity=multiplicity,
    )  # fmt: skip
    plain = fit_intervals(errors, scales, images, coverage=0.8, multiplicity=multiplicity, asymmetric=True)
    np.testing.assert_allclose(flipped.factors, plain.factors[::-1, [2, 3, 0, 1]])


def test_a_small_class_uses_the_pooled_quantile_and_the_record_says_so():
    errors, scales, images = drawn(3, n=60)
    classes = np.array([5] * 30 + [2] * 22 + [7] * 8)
    fitted = fit_intervals(errors, scales, images, coverage=0.9, level="class", classes=classes)
    assert fitted.pooled_classes == (7,)
    assert sorted(fitted.class_factors) == [2, 5]
    assert "classes 7 have fewer than 9 labels" in fitted.warning()
    pooled = fit_intervals(errors, scales, images, coverage=0.9)
    np.testing.assert_array_equal(fitted.factors, pooled.factors)
    for name in (2, 5):
        own = classes == name
        alone = fit_intervals(errors[own], scales[own], images[own], coverage=0.9)
        np.testing.assert_array_equal(fitted.class_factors[name], alone.factors)
        np.testing.assert_array_equal(
            fitted.half_widths(scales[own], classes[own]), alone.half_widths(scales[own])
        )
    for name in (7, 1234):
        np.testing.assert_array_equal(
            fitted.half_widths(scales[:2], np.full(2, name)), pooled.half_widths(scales[:2])
        )
    again = Intervals.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again.half_widths(scales, classes), fitted.half_widths(scales, classes))
    assert again.to_dict() == fitted.to_dict()


def test_classes_may_be_texts():
    errors, scales, images = drawn(6)
    numbers = np.array([5] * 30 + [2] * 25 + [7] * 5)
    texts = np.array(["b"] * 30 + ["a"] * 25 + ["c"] * 5)
    by_number = fit_intervals(errors, scales, images, coverage=0.9, level="class", classes=numbers)
    by_text = fit_intervals(errors, scales, images, coverage=0.9, level="class", classes=texts.astype(object))
    assert by_text.pooled_classes == ("c",)
    again = Intervals.from_dict(json.loads(json.dumps(by_text.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again.half_widths(scales, texts), by_number.half_widths(scales, numbers))
    # A class of another kind was not fitted.
    np.testing.assert_array_equal(
        again.half_widths(scales, numbers), again.half_widths(scales, np.full(60, "d"))
    )


def test_ids_may_be_texts_and_rows_may_come_in_any_order():
    errors, scales, images = drawn(4)
    order = np.random.default_rng(0).permutation(len(errors))
    for level in LEVELS:
        choices = {"coverage": 0.7, "level": level, "classes": np.ones(60, int)}
        fitted = fit_intervals(errors, scales, images, **choices)
        names = np.array([f"image {i}" for i in images])
        again = fit_intervals(errors[order], scales[order], names[order], **choices)
        assert fitted.to_dict() == again.to_dict()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("multiplicity", ["max", "edge"])
def test_the_promise_names_share_units_and_conditions(level, multiplicity):
    errors, scales, images = drawn(5)
    fitted = fit_intervals(
        errors, scales, images, coverage=0.8, level=level, multiplicity=multiplicity, classes=np.ones(60, int)
    )
    text = fitted.promise().lower()
    assert "80 %" in text
    assert "matched box" in text
    assert "exchangeable" in text
    assert "score threshold" in text
    assert ("all four edges" in text) == (multiplicity == "max")
    assert ("images" in text) == (level in ("image", "image_mean"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coverage": 1.0}, "coverage = 1.0 must be above 0 and below 1, such as 0.9"),
        ({"coverage": 0.0}, "coverage = 0.0 must be above 0 and below 1"),
        ({"coverage": -0.1}, "must be above 0"),
        ({"coverage": float("nan")}, "coverage = nan must be above 0"),
        ({"errors": np.zeros((0, 4)), "scales": np.zeros((0, 4))}, "no matched detection to fit"),
        ({"errors": [[1, 2, 3, np.nan]] * 3}, r"errors\[0\] = \[1.0, 2.0, 3.0, nan\] is not finite"),
        ({"scales": [[1, 1, 1, 1], [1, np.inf, 1, 1], [1, 1, 1, 1]]}, r"scales\[1\] = .* is not finite"),
        ({"scales": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]]}, r"scales\[2\] .* must be positive; raise stds"),
        ({"scales": np.ones((2, 4))}, "scales has 2 rows, not 3"),
        ({"errors": np.zeros((3, 2))}, r"errors has shape \(3, 2\); give \[n, 4\]"),
        ({"image_ids": [1, 2]}, r"image_ids has shape \(2,\); give \[3\]"),
        ({"multiplicity": "holm"}, "multiplicity = 'holm' is unknown; choose max, .* or edge"),
        ({"level": "frame"}, "level = 'frame' is unknown; choose box, class, image or image_mean"),
        ({"level": "class"}, "classes is missing"),
        ({"level": "class", "classes": [0.5, 1, 2]}, "classes must be whole numbers, or texts"),
        ({"level": "image", "missed_share": 1.0}, "missed_share = 1.0 must be from 0 to below 1"),
        ({"missed_share": 0.1}, "missed_share = 0.1 is for level 'image' and not for 'box'"),
        ({"level": "image_mean", "multiplicity": "sidak"}, "'sidak' does not fit a share .* choose max or edge"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(changes, message):
    arguments = {
        "errors": np.ones((3, 4)), "scales": np.ones((3, 4)), "image_ids": [0, 1, 2], "coverage": 0.5,
    } | changes  # fmt: skip
    if not len(arguments["errors"]):
        arguments["image_ids"] = []
    with pytest.raises(ValueError, match=message) as error:
        fit_intervals(
            arguments.pop("errors"), arguments.pop("scales"), arguments.pop("image_ids"), **arguments
        )
    assert "\n" not in str(error.value)


def test_half_widths_refuse_what_was_not_fitted():
    fitted = fit_intervals(
        np.ones((9, 4)), np.ones((9, 4)), np.arange(9), coverage=0.5, level="class", classes=np.ones(9, int)
    )
    with pytest.raises(ValueError, match="classes is missing"):
        fitted.half_widths(np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"scales.* must be positive"):
        fitted.half_widths(np.zeros((2, 4)), [1, 1])
    assert fitted.half_widths(np.zeros((0, 4)), np.zeros(0, int)).shape == (0, 4)


def test_scales_of_the_three_scores():
    boxes, stds = np.array([[10.0, 20, 40, 25], [5, 5, 5.5, 9]]), np.full((2, 4), 0.5)
    np.testing.assert_array_equal(interval_scales("scaled", boxes, stds), stds)
    np.testing.assert_array_equal(interval_scales("additive", boxes), np.ones((2, 4)))
    np.testing.assert_array_equal(interval_scales("multiplicative", boxes), [[30, 5, 30, 5], [1, 4, 1, 4]])
    with pytest.raises(ValueError, match="score = 'log' is unknown; choose scaled, additive or multi"):
        interval_scales("log", boxes)
    with pytest.raises(ValueError, match="'scaled' needs stds"):
        interval_scales("scaled", boxes)


def test_a_split_keeps_images_whole():
    images = np.random.default_rng(0).integers(0, 30, 400)
    first = split_images(images, 0.4, seed=3)
    assert not set(images[first]) & set(images[~first])
    assert len(set(images[first])) == 12
    np.testing.assert_array_equal(split_images(images[::-1], 0.4, seed=3), first[::-1])
    assert (split_images(images, 0.4, seed=4) != first).any()
    assert split_images(["a", "b"], 0.01, seed=0).sum() == 1
    with pytest.raises(ValueError, match="two images or more; there are 1"):
        split_images([5, 5, 5], 0.5, seed=0)
    with pytest.raises(ValueError, match=r"share = 1.0 must be between 0 and 1"):
        split_images([5, 6], 1.0, seed=0)


def test_outer_and_inner_boxes():
    box = np.array([[10.0, 20, 50, 60]])
    outer, inner = outer_and_inner_boxes(box - np.array([1, 2, 3, 4]), box + np.array([5, 6, 7, 8]))
    np.testing.assert_array_equal(outer, [[9, 18, 57, 68]])
    np.testing.assert_array_equal(inner, [[15, 26, 47, 56]])
