"""Bad input ends in one clear line and a status that is not zero."""

import pytest

from klbox_jax.cli import report_user_errors
from klbox_jax.files import read_json, write_json
from klbox_jax.main import run
from klbox_jax.train.workdir import Workdir
from tests.coco_folder import content, write_annotations, write_folder
from tests.programs import exit_code_of, run_python
from tests.thin import coco_config


@pytest.fixture
def pond(tmp_path):
    return write_folder(tmp_path / "pond", images_per_shape=1)


def error_of(config, tmp_path, mode="train_and_eval"):
    """The error that a program prints in one line before it exits."""
    message = exit_code_of(config, tmp_path / "run", mode)
    assert isinstance(message, str)  # which makes the status 1
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


def broken(pond, tmp_path, change):
    annotations = content("train", images_per_shape=1)
    change(annotations)
    path = write_annotations(pond, "train", annotations)
    message = error_of(coco_config(pond), tmp_path)
    assert message.startswith(f"error: {path}: ")
    assert not (tmp_path / "run").exists()
    return message


def test_a_missing_folder(tmp_path):
    message = error_of(coco_config(tmp_path / "nowhere"), tmp_path)
    assert message.startswith(f"error: {tmp_path / 'nowhere'} is not a folder. Check")
    assert "config.data.root is empty" in error_of(coco_config(""), tmp_path)


def test_annotations_that_are_not_json(pond, tmp_path):
    path = write_annotations(pond, "train", '{"images": [')
    assert error_of(coco_config(pond), tmp_path).startswith(f"error: {path} is not valid JSON")


def test_a_missing_key(pond, tmp_path):
    message = broken(pond, tmp_path, lambda content: content["annotations"][2].pop("bbox"))
    assert "annotations[2] (id 3) has no 'bbox'" in message


def test_a_box_without_size(pond, tmp_path):
    message = broken(pond, tmp_path, lambda content: content["annotations"][1].update(bbox=[3, 4, 0, 9]))
    assert "annotation 2 has a box with no positive width and height: [3, 4, 0, 9] in image 1" in message


def test_an_unknown_category(pond, tmp_path):
    message = broken(pond, tmp_path, lambda content: content["annotations"][0].update(category_id=99))
    assert "annotation 1 has category_id 99, which 'categories' does not list" in message


def test_a_file_name_that_leads_out(pond, tmp_path):
    message = broken(pond, tmp_path, lambda content: content["images"][0].update(file_name="../secret.png"))
    assert "'../secret.png' of image 1 does not stay in the image folder" in message


def test_a_missing_image(pond, tmp_path):
    (pond / "train" / "1.png").unlink()
    message = error_of(coco_config(pond), tmp_path)
    assert "image 2 is unusable" in message
    assert str(pond / "train" / "1.png") in message


def test_a_truncated_image_of_the_evaluation_set(pond, tmp_path):
    path = pond / "valid" / "2.png"
    path.write_bytes(path.read_bytes()[:-500])
    message = error_of(coco_config(pond), tmp_path)
    assert "image 3 is unusable" in message
    assert str(path) in message
    assert not (tmp_path / "run").exists()


def test_more_objects_than_slots(pond, tmp_path):
    message = error_of(coco_config(pond, **{"data.max_gt": 1}), tmp_path)
    assert f"{pond / 'train' / '0.png'} (image 1) has 2 objects, but max_gt is 1" in message


def test_other_classes_in_the_evaluation_set(pond, tmp_path):
    annotations = content("valid", images_per_shape=1)
    annotations["categories"] = [{"id": 3, "name": "fish"}, {"id": 7, "name": "shark"}]
    write_annotations(pond, "valid", annotations)
    assert "has the classes ('fish', 'ray'), but pond/valid has ('fish', 'shark')" in error_of(
        coco_config(pond), tmp_path
    )


def test_a_workdir_of_another_config(pond, tmp_path):
    Workdir(tmp_path / "run").prepare(coco_config(pond).to_dict())
    message = error_of(coco_config(pond, **{"optimizer.learning_rate": 0.5}), tmp_path)
    assert message.startswith(f"error: {tmp_path / 'run'} belongs to a run with another config: ")
    before = coco_config(pond).optimizer.learning_rate
    assert f" config: optimizer.learning_rate was {before}, now 0.5. Choose another --workdir" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "postprocess.voting",
            "loud",
            "voting must be one of none, variance, variance_score, iou, iou_score, box_voting, wbf, bayes; got 'loud'",
        ),
        ("model.box_loss", "l2", "config.model.box_loss = 'l2' is unknown"),
        ("optimizer.name", "adam", "config.optimizer.name = 'adam' is unknown; choose adamw or sgd"),
        (
            "optimizer.warmup_steps",
            -1,
            "config.optimizer.warmup_steps has -1; give a whole number of steps, or a share",
        ),
        ("optimizer.decay_at", (0.5, 1.5), "config.optimizer.decay_at has 1.5; give a whole number of steps"),
        (
            "data.name",
            "kitti",
            "config.data.name = 'kitti' is unknown; choose one of auto, coco, scenes, tfds, voc, yolo",
        ),
        ("data.canvases", ((64, 64),), "fits none of the canvases ((64, 64),)"),
    ],
)
def test_fields_out_of_range(pond, tmp_path, field, value, message):
    assert message in error_of(coco_config(pond, **{field: value}), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("loss=smooth_l1,voting=variance", {}, "voting='variance' needs box_log_vars"),
        ("loss=l1,voting=bayes", {}, "config.postprocess.voting to none, iou, iou_score, box_voting or wbf"),
        ("loss=kl,suppression=iou_guided", {}, "config.model.iou_head.enabled=True"),
        ("loss=kl", {"postprocess.refine_steps": 5}, "refine_steps=5 needs an IoU head"),
        ("loss=lasernet_kl", {}, "config.model.box_loss_settings.label_noise to 'pixels' or 'size'"),
        ("loss=gaussian_kl", {}, "needs the label noise of each edge, which pond/train does not have"),
        (
            "loss=kl",
            {"model.roi_heads.box_coder": "center"},
            "needs config.model.roi_heads.box_coder = 'corner'",
        ),
        ("loss=kl", {"model.mask_head.enabled": True}, "set config.data.mask_size to their resolution"),
        (
            "loss=beta_nll",
            {"model.box_loss_settings.beta_nll_beta": 2.0},
            "box_loss_settings.beta_nll_beta = 2.0",
        ),
    ],
)
def test_methods_that_do_not_go_together(pond, tmp_path, variant, fields, message):
    assert message in error_of(coco_config(pond, variant, **fields), tmp_path)
    assert not (tmp_path / "run").exists()


def test_evaluating_a_folder_without_a_run(pond, tmp_path):
    assert "has no checkpoint; train first" in error_of(coco_config(pond), tmp_path, "eval")


def test_predicting_in_a_folder_without_a_run(pond, tmp_path):
    config = coco_config("", **{"predict.input": str(pond / "train")})
    assert error_of(config, tmp_path, "predict").startswith(
        f"error: {tmp_path / 'run'} is not the folder of a run"
    )


def test_an_unknown_mode(tmp_path):
    with pytest.raises(ValueError, match=r"mode 'detect' is unknown; choose one of train, eval, .*predict"):
        run(coco_config(""), str(tmp_path / "run"), "detect")


def test_training_keeps_the_classes(pond, tmp_path, monkeypatch):
    monkeypatch.setattr("klbox_jax.modes.train", lambda job, claim, **arguments: claim())
    assert run(coco_config(pond), str(tmp_path / "run"), "train") == {}
    assert read_json(tmp_path / "run" / "classes.json") == {
        "names": ["fish", "ray"],
        "category_ids": [3, 7],
    }
    write_json(tmp_path / "run" / "classes.json", {"names": ["ray", "fish"], "category_ids": [3, 7]})
    with pytest.raises(ValueError, match="was trained on the classes"):
        run(coco_config(pond), str(tmp_path / "run"), "train")
    assert run(coco_config(pond), str(tmp_path / "run"), "train", allow_config_change=True) == {}


def test_a_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("KLBOX_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"config\.data\.root is empty"):
        report_user_errors(lambda argv: run(coco_config(""), str(tmp_path / "run"), "train"))(["program"])


def command_line(*arguments, status=1):
    _, stderr = run_python("-m", "klbox_jax.main", *arguments, status=status)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    return errors[0]


def test_the_command_line_refuses_an_unknown_field(tmp_path):
    line = command_line(
        "--config=configs/scenes.py:loss=kl",
        f"--workdir={tmp_path / 'run'}",
        "--config.optimizer.lerning_rate=0.1",
        status=2,
    )
    assert "no field optimizer.lerning_rate; the closest is optimizer.learning_rate" in line


def test_the_command_line_names_missing_data(tmp_path):
    line = command_line(
        "--config=configs/faster_rcnn_mobilenet_v2_fpn.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.root={tmp_path / 'nowhere'}",
    )
    assert line.startswith(f"error: {tmp_path / 'nowhere'} is not a folder")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.save_every": 0}, "config.train.save_every = 0 must be at least 1 step"),
        ({"train.log_every": -1}, "config.train.log_every = -1 must be at least 1 step"),
        ({"train.num_steps": -4}, "config.train.num_steps = -4 with num_epochs = "),
        ({"train.num_steps": 0, "train.num_epochs": 0.0}, "with num_epochs = 0.0 is no training"),
    ],
)
def test_numbers_that_mean_nothing(pond, tmp_path, fields, message):
    assert message in error_of(coco_config(pond, **fields), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["predict", "export", "calibrate"])
def test_a_checkpoint_that_is_neither_the_last_nor_the_best(pond, tmp_path, mode):
    config = coco_config(pond, **{"evaluation.checkpoint": "bset"})
    with pytest.raises(ValueError, match=r"config\.evaluation\.checkpoint = 'bset' is unknown"):
        run(config, str(tmp_path / "run"), mode)
