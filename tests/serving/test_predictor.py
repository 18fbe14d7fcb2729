import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from klbox_jax import distributed
from klbox_jax.data.loader import eval_batches
from klbox_jax.data.source import DataError
from klbox_jax.errors import CheckpointError, WorkdirError
from klbox_jax.evaluation.eval_step import Evaluator, compile_eval_step
from klbox_jax.files import read_json, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.serving.prediction import Prediction
from klbox_jax.serving.predictor import load
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.job import Job
from klbox_jax.weights.safetensors_file import WeightFileError, save_params
from tests.coco_folder import write_folder
from tests.serving.thin_run import TWO_CANVASES, copy_run, write_run
from tests.thin import coco_config

pytestmark = pytest.mark.four_devices


@pytest.fixture(scope="module")
def config(module_path):
    return coco_config(write_folder(module_path / "pond", images_per_shape=1), **TWO_CANVASES)


@pytest.fixture(scope="module")
def workdir(module_path, config):
    return write_run(module_path / "run", config, steps=(3, 6))


@pytest.fixture(scope="module")
def predictor(workdir):
    return load(workdir.path)


def assert_same(one, other):
    for field in dataclasses.fields(Prediction):
        if field.name == "source":
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def test_the_evaluation_finds_the_same(config, workdir, predictor):
    job = Job(config=config, workdir=workdir)
    settings = {"": PostprocessSettings(**config.postprocess)}
    evaluator = Evaluator(
        step=compile_eval_step(job.mesh, model=job.model, settings=settings),
        mesh=job.mesh,
        category_ids=job.eval_source.category_ids,
    )
    step, params = restore_params(workdir.checkpoints)
    assert (step, predictor.step) == (6, 6)
    batches = eval_batches(job.eval_source, job.eval_plan, job.preprocessing, num_threads=0)
    expected = evaluator(jax.device_put(params, distributed.replicated(job.mesh)), batches)[""]
    assert len(expected) > 20
    for record in job.eval_source.records:
        found = predictor(record.file_name).to_coco(record.image_id)
        wanted = [entry for entry in expected if entry["image_id"] == record.image_id]
        assert len(found) == len(wanted) > 0
        for one, other in zip(found, wanted, strict=True):
            assert one["category_id"] == other["category_id"]
            assert one["category"] == {3: "fish", 7: "ray"}[one["category_id"]]
            for name in ("bbox", "score", "bbox_std"):
                # to_coco_results rounds boxes to 1e-4 pixels.
                tolerance = 1.5e-4 if name == "bbox" else 1e-5
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=tolerance)


def test_a_path_a_pillow_image_and_an_array_are_one(predictor, photographs):
    folder, images = photographs
    for name, pixels in images.items():
        expected = predictor(pixels)
        assert expected.image_size == pixels.shape[:2]
        assert expected.boxes.dtype == expected.box_stds.dtype == expected.scores.dtype == np.float32
        height, width = pixels.shape[:2]
        assert (expected.boxes[:, 2:] <= [[width, height]]).all()
        assert (np.diff(expected.scores) <= 0).all()
        assert_same(predictor(str(folder / name)), expected)
        with Image.open(folder / name) as image:
            assert_same(predictor(image), expected)
    # Five sizes, two canvases.
    assert {pixels.shape for pixels in images.values()} >= {(100, 150, 3), (150, 100, 3), (80, 80, 3)}
    assert predictor._step.num_traces == 2


def test_an_image_too_long_for_any_canvas_is_shrunk(predictor):
    larger = dataclasses.replace(predictor.preprocessing, short_side=80)
    batch = dataclasses.replace(predictor, preprocessing=larger).prepare(np.ones((90, 120, 3), np.uint8))
    # 72 x 96 fits neither 64 x 96 nor 96 x 64; on the first, 64 x 85 is left of it, on the second 48 x 64.
    assert batch.images.shape == (1, 64, 96, 3)
    assert batch.image_size.tolist() == [[64, 85]]
    np.testing.assert_allclose(batch.scale, [[85 / 120, 64 / 90]], rtol=1e-6)


def test_pillow_images_as_files_are_read(predictor):
    rgba = np.random.default_rng(0).integers(0, 256, (80, 80, 4), np.uint8)
    over_black = (rgba[..., :3] * (rgba[..., 3:] / 255.0)).round().astype(np.uint8)
    found, expected = predictor(Image.fromarray(rgba)), predictor(over_black)
    np.testing.assert_allclose(found.scores[:5], expected.scores[:5], atol=0.01)


def test_a_list_is_a_batch(predictor, photographs):
    """Seven images of two canvases: a batch of two of each, and the rest one by one; in the order of the list."""
    folder, images = photographs
    names = [
        "landscape.png",
        "portrait.PNG",
        "grey.png",
        "four_by_three.png",
        "turned.png",
        "square <b>&.png",
    ]
    batched = predictor.with_settings()
    found = batched([folder / name for name in names], batch_size=2)
    # Each canvas is compiled for two images, and one of them for a single image too.
    assert 2 <= batched._step.num_traces <= 4
    assert [one.source for one in found] == [folder / name for name in names]
    for one, name in zip(found, names, strict=True):
        expected = predictor(images[name])
        assert one.image_size == expected.image_size
        np.testing.assert_allclose(one.boxes[:10], expected.boxes[:10], atol=1e-3)
        np.testing.assert_allclose(one.scores[:10], expected.scores[:10], atol=1e-5)
    assert predictor([]) == []
    (single,) = predictor((images["grey.png"],))
    assert_same(single, predictor(images["grey.png"]))
    with pytest.raises(DataError, match=r"^image 1 of the list: .*nowhere\.jpg does not exist"):
        predictor([images["grey.png"], folder / "nowhere.jpg"])
    with pytest.raises(ValueError, match="batch_size = 0 must be at least 1"):
        predictor([images["grey.png"]], batch_size=0)


def test_the_text_of_a_detector_is_short(predictor, workdir):
    assert repr(predictor) == f"Predictor({str(workdir.path)!r}, step 6, kl, 2 classes: fish, ray)"


def test_files_that_are_no_images_are_named(predictor, photographs):
    folder, _ = photographs
    for name, message in (
        ("damaged.jpg", "cannot be decoded"),
        ("nothing.jpg", "does not exist; check the path"),
    ):
        with pytest.raises(DataError, match=rf"{name} {message}"):
            predictor(folder / name)


def test_other_settings_are_another_predictor(predictor, photographs):
    hard = predictor.with_settings(suppression="hard", voting="none", score_threshold=1.0)
    assert hard.params is predictor.params
    prediction = hard(photographs[1]["landscape.png"])
    assert prediction.boxes.shape == prediction.box_stds.shape == (0, 4)
    assert prediction.to_coco(1) == []
    assert predictor.settings.voting == "variance"
    with pytest.raises(ValueError, match="iou_guided"):
        predictor.with_settings(suppression="iou_guided")


def test_an_image_and_its_mirror_image_are_one_to_flip(predictor, photographs):
    # On its canvas without resizing, and so pixel for pixel the mirror image there too.
    pixels = photographs[1]["square <b>&.png"][:64, :64]
    settings = {"flip": True, "pre_nms_topk": 2 * predictor.settings.pre_nms_topk}
    flipping = predictor.with_settings(**settings, detections_per_image=10)
    found, other = flipping(pixels), flipping(pixels[:, ::-1])
    assert len(found.boxes) == 10
    x1, y1, x2, y2 = found.boxes.T
    np.testing.assert_allclose(other.boxes, np.stack([64 - x2, y1, 64 - x1, y2], axis=1), atol=2e-3)
    np.testing.assert_allclose(other.box_stds, found.box_stds[:, [2, 1, 0, 3]], rtol=1e-3)
    np.testing.assert_allclose(other.scores, found.scores, rtol=1e-4)
    np.testing.assert_array_equal(other.classes, found.classes)


def test_supervision(predictor, photographs, monkeypatch):
    # The names and types of `supervision.Detections`, version 0.31.
    stand_in = types.ModuleType("supervision")
    fields = ("xyxy", "mask", "confidence", "class_id", "tracker_id", "data", "metadata")
    stand_in.Detections = dataclasses.make_dataclass("Detections", [(name, object, None) for name in fields])
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    prediction = predictor(photographs[1]["landscape.png"])
    found = prediction.to_supervision()
    np.testing.assert_array_equal(found.xyxy, prediction.boxes)
    np.testing.assert_array_equal(found.confidence, prediction.scores)
    np.testing.assert_array_equal(found.class_id, prediction.classes)
    np.testing.assert_array_equal(found.data["box_std"], prediction.box_stds)
    assert found.data["class_name"].tolist() == [("fish", "ray")[i] for i in prediction.classes]
    assert found.mask is None
    # Two masks: all of the first box, none of the second.
    with_masks = dataclasses.replace(
        prediction,
        **{name: getattr(prediction, name)[:2] for name in ("scores", "classes", "box_stds")},
        boxes=np.array([[10, 20, 30, 50], [0, 0, 9, 9]], np.float32),
        masks=np.stack([np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)]),
    )
    masks = with_masks.to_supervision().mask
    assert (masks.shape, masks.dtype) == ((2, 100, 150), bool)
    # A mask fades at its border, by less than a cell of 5 x 7.5 pixels.
    assert masks[0, 28:42, 15:25].all()
    assert not masks[0, :20].any()
    assert not masks[1].any()
    assert [entry["segmentation"]["size"] for entry in with_masks.to_coco(1)] == [[100, 150], [100, 150]]

    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        prediction.to_supervision()


def test_calibrated_stds(workdir, predictor, photographs, tmp_path):
    calibrated = copy_run(workdir, tmp_path / "calibrated")
    write_json(
        calibrated.calibration_file(6),
        {"temperature": [1.0, 2.0, 0.5, 3.0], "postprocess": vars(predictor.settings)},
    )
    assert predictor.temperature is None
    assert load(calibrated.path, calibrated=False).temperature is None
    assert load(calibrated.path, step=3).temperature is None
    loaded = load(calibrated.path)
    assert loaded.temperature.tolist() == [1, 2, 0.5, 3]
    # The calibration does not hold for the stds of another voting.
    assert loaded.with_settings(voting="none").temperature is None
    loaded.__dict__["_step"] = predictor._step  # compiled for the same parameters and settings
    image = photographs[1]["square <b>&.png"]
    one, other = predictor(image), loaded(image)
    np.testing.assert_allclose(other.box_stds, one.box_stds * [[1, 2, 0.5, 3]], rtol=1e-6)
    assert other.box_stds.dtype == np.float32
    np.testing.assert_array_equal(other.boxes, one.boxes)


def test_a_shipped_folder(workdir, predictor, tmp_path):
    shipped = copy_run(workdir, tmp_path / "shipped", "checkpoints")
    _, params = restore_params(workdir.checkpoints)
    path = shipped.path / "model.safetensors"
    save_params(path, params, metadata={"step": "6"})
    loaded = load(shipped.path, step=6)
    assert load(shipped.path).step == 6
    jax.tree.map(np.testing.assert_array_equal, loaded.params, predictor.params)
    assert loaded.model == predictor.model
    with pytest.raises(WorkdirError, match="is of step 6, not 3"):
        load(shipped.path, step=3)
    save_params(path, params, metadata={}, dtype="float16")
    halved = load(shipped.path)
    assert halved.step is None
    assert {leaf.dtype.name for leaf in jax.tree.leaves(halved.params)} == {"float32"}


def test_a_step_is_chosen(workdir, predictor):
    older = load(workdir.path, step=3)
    assert older.step == 3
    leaves = [jax.tree.leaves(one.params)[-1] for one in (older, predictor)]
    assert (np.asarray(leaves[0]) != np.asarray(leaves[1])).any()
    with pytest.raises(CheckpointError, match="has no checkpoint of step 5; it has 3, 6"):
        load(workdir.path, step=5)


def test_classes_of_a_run_that_did_not_keep_them(workdir, tmp_path):
    older = copy_run(workdir, tmp_path / "older", "classes.json")
    loaded = load(older.path)
    assert (loaded.class_names, loaded.category_ids) == (("fish", "ray"), (3, 7))
    fields = read_json(older.config)
    fields["data"]["root"] = str(tmp_path / "nowhere")
    write_json(older.config, fields)
    with pytest.raises(WorkdirError, match=r"has no classes.json, .*nowhere is not a folder.*; write "):
        load(older.path)
    fields["data"]["class_names"] = ["cod", "eel"]
    write_json(older.config, fields)
    assert load(older.path).class_names == ("cod", "eel")
    older.classes.write_text('{"names": ["fish"]}')
    with pytest.raises(WorkdirError, match=r"classes.json must be \{"):
        load(older.path)
    older.classes.write_text(json.dumps({"names": ["a", "b", "c"], "category_ids": [1, 2, 3]}))
    with pytest.raises(WeightFileError, match="does not fit the model"):
        load(older.path)


def test_folders_of_no_run(workdir, tmp_path):
    with pytest.raises(WorkdirError, match=r"nowhere is not the folder of a run: it has no config.json"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no checkpoint; train first"):
        load(copy_run(workdir, tmp_path / "empty", "checkpoints").path)
    other = copy_run(workdir, tmp_path / "other", "checkpoints")
    fields = read_json(other.config)
    del fields["model"]["rpn"]
    write_json(other.config, fields)
    with pytest.raises(WorkdirError, match="does not describe a detector of this version"):
        load(other.path)
