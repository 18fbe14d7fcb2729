import numpy as np
import pytest

from klbox_jax.evaluation.edge_calibration import fit_edge_calibration
from klbox_jax.serving.prediction import Prediction
from tests.evaluation.test_results_calibration import drawn_results


def prediction(calibration, count=3):
    return Prediction(
        boxes=np.array([[10, 20, 30, 60], [0, 0, 9, 9], [50, 50, 90, 80]], np.float32)[:count],
        scores=np.array([0.9, 0.7, 0.45], np.float32)[:count],
        classes=np.array([1, 0, 1])[:count],
        class_names=("cat", "dog"),
        category_ids=(1, 2),
        box_stds=np.array([[1, 2, 1, 3], [4, 4, 4, 4], [0.5, 1, 2, 1]], np.float32)[:count],
        masks=None,
        image_size=(100, 150),
        edge_calibration=calibration,
    )


@pytest.fixture(scope="module")
def calibration():
    return fit_edge_calibration(*drawn_results(0), data="pond/calibration")


def test_intervals_of_an_image(calibration):
    found = prediction(calibration)
    intervals = found.intervals(coverage=0.8)
    half = calibration.intervals(0.8).factors[0, 0] * found.box_stds
    np.testing.assert_allclose(intervals.lower, found.boxes - half)
    np.testing.assert_allclose(intervals.upper, found.boxes + half)
    np.testing.assert_allclose(intervals.outer, found.boxes + half * [-1, -1, 1, 1])
    np.testing.assert_allclose(intervals.inner, found.boxes - half * [-1, -1, 1, 1])
    assert intervals.coverage == 0.8
    assert "at least 80 % of matched boxes" in intervals.promise
    assert "images of pond/calibration" in intervals.promise
    assert intervals.warning is None
    assert (found.intervals().upper > intervals.upper).all()  # 90 %
    np.testing.assert_array_equal(found.above(0.5).intervals(0.8).upper, intervals.upper[:2])


def test_intervals_by_class(calibration):
    found = prediction(calibration)
    intervals = found.intervals(level="class")
    fitted = calibration.intervals(0.9, level="class")
    assert set(fitted.class_factors) == {1, 2}
    half = (intervals.upper - found.boxes) / found.box_stds
    np.testing.assert_allclose(half[0], fitted.class_factors[2][0], rtol=1e-5)
    np.testing.assert_allclose(half[1], fitted.class_factors[1][0], rtol=1e-5)


def test_calibrated_scores(calibration):
    found = prediction(calibration)
    wanted = calibration.calibrated_scores([0.9, 0.7, 0.45], [2, 1, 2])
    np.testing.assert_allclose(found.calibrated_scores, wanted, rtol=1e-5)
    entries = found.to_coco(7)
    assert [entry["score_calibrated"] for entry in entries] == pytest.approx(wanted.tolist(), abs=1e-5)
    ends = [entry["bbox_interval_90"]["lower"] for entry in entries]
    np.testing.assert_allclose(ends, found.intervals().lower, atol=1e-2)


def test_an_image_without_objects(calibration):
    nothing = prediction(calibration, count=0)
    assert nothing.intervals().outer.shape == (0, 4)
    assert nothing.calibrated_scores.shape == (0,)
    assert nothing.to_coco(1) == []


def test_errors_name_the_remedy(calibration):
    for ask in (lambda one: one.intervals(), lambda one: one.calibrated_scores):
        with pytest.raises(ValueError, match="no intervals under this post-processing; run --mode=calibrate"):
            ask(prediction(None))
    assert set(prediction(None).to_coco(1)[0]) == set(prediction(calibration).to_coco(1)[0]) - {
        "bbox_interval_90",
        "score_calibrated",
    }
    with pytest.raises(ValueError, match="needs 999 calibration labels and there are 180"):
        prediction(calibration).intervals(0.999)
    with pytest.raises(ValueError, match=r"coverage = 1\.0 must be above 0 and below 1"):
        prediction(calibration).intervals(1.0)
    with pytest.raises(ValueError, match="level = 'photo' is unknown"):
        prediction(calibration).intervals(level="photo")
    with pytest.raises(
        ValueError, match="no matched detection to fit intervals to; lower the score threshold"
    ):
        prediction(calibration).intervals(min_score=1.1)
