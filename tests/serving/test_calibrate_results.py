import json

import pytest

from klbox_jax.errors import WorkdirError
from klbox_jax.evaluation.results_calibration import CalibrationSettings
from klbox_jax.serving.calibrate_results import FILE_NAME, apply_calibration, calibrate_results
from tests.evaluation.test_results_calibration import drawn_results


@pytest.fixture
def files(tmp_path):
    ground_truth, results = drawn_results(0, num_images=20, with_stds=False)
    (tmp_path / "instances.json").write_text(json.dumps(ground_truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def calibrated(folder, **more):
    return calibrate_results(folder / "results.json", folder / "instances.json", folder / "out", **more)


def test_two_calls_add_intervals_and_calibrated_scores(files):
    settings = CalibrationSettings(coverages=(0.8,), min_score=0.5)
    calibration = calibrated(files, settings=settings, postprocess={"nms": 0.5})
    stored = json.loads((files / "out" / FILE_NAME).read_text())
    assert stored["postprocess"] == {"nms": 0.5}
    assert stored["settings"]["iou_threshold"] == 0.5
    assert stored["settings"]["min_score"] == 0.5
    assert stored["num_images"] == 20
    _, others = drawn_results(1, num_images=5, with_stds=False)
    (files / "others.json").write_text(json.dumps(others))
    for postprocess in ({"nms": 0.5}, None):
        applied = apply_calibration(
            files / "others.json", files / "out", files / "new" / "applied.json", postprocess=postprocess
        )
        written = json.loads((files / "new" / "applied.json").read_text())
        assert written == calibration.apply(others)
    assert applied.num_results == len(others)
    assert applied.num_without_intervals == sum(entry["score"] < 0.5 for entry in others) > 0
    assert applied.output == files / "new" / "applied.json"
    assert applied.calibration.lines() == calibration.lines()


def test_another_post_processing_is_refused(files):
    calibrated(files, postprocess={"nms": 0.5})
    with pytest.raises(
        ValueError, match=r"was fitted under the post-processing {'nms': 0.5}, and these results"
    ):
        apply_calibration(
            files / "results.json", files / "out", files / "applied.json", postprocess={"nms": 0.6}
        )
    assert not (files / "applied.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "[]", r"results.json has no detections; write the results with a lower"),
        ("results.json", "{}", r"results.json is no list of COCO results"),
        ("results.json", "[1]", r"results.json is no list of COCO results"),
        ("results.json", "[", r"results.json is not readable as JSON"),
        ("instances.json", "[]", r"instances.json has no list of images; give a COCO annotation file"),
        ("instances.json", '{"images": [], "annotations": []}', r"instances.json has no list of categories"),
        (
            "results.json",
            '[{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]',
            r"results\[0\]: image_id 7 is not in the ground truth",
        ),
        (
            "results.json",
            '[{"image_id": 10, "category_id": 1, "bbox": [0, 0, 1, 1], "score": NaN}]',
            r"results\[0\]: score must be a finite number",
        ),
        (
            "results.json",
            '[{"image_id": 10, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]',
            r"no matched detection to fit",
        ),
    ],
)
def test_files_at_fault_end_in_one_line(files, name, text, message):
    (files / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        calibrated(files)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (files / "out").exists()


def test_missing_files_are_named(files):
    with pytest.raises(FileNotFoundError, match=r"results_calibration.json is missing; fit a calibration"):
        apply_calibration(files / "results.json", files / "out", files / "applied.json")
    (files / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"results.json"):
        calibrated(files)


def test_a_calibration_of_another_form_is_refused(files):
    calibrated(files)
    path = files / "out" / FILE_NAME
    fields = json.loads(path.read_text())
    for broken in ({"settings": {}}, {**fields, "intervals": [{"coverage": 0.9}]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="is no calibration of this version"):
            apply_calibration(files / "results.json", files / "out", files / "applied.json")


def test_a_folder_that_cannot_be_made_is_named(files):
    (files / "out").write_text("a file")
    with pytest.raises(WorkdirError, match="out"):
        calibrated(files)
