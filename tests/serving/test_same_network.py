"""An evaluation refuses a config of another network than the trained one."""

import pytest

from klbox_jax.files import read_json, write_json
from klbox_jax.main import run
from klbox_jax.train.best_checkpoint import scores
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics
from tests.coco_folder import write_folder
from tests.serving.thin_run import write_run
from tests.thin import coco_config


@pytest.fixture(scope="module")
def pond(module_path):
    return write_folder(module_path / "pond", images_per_shape=1)


@pytest.fixture
def run_path(pond, tmp_path):
    return write_run(tmp_path / "run", coco_config(pond)).path


def evaluate(run_path, pond, **fields):
    return run(coco_config(pond, **fields), str(run_path), "eval")


@pytest.mark.parametrize(
    "field", ["model.box_loss", "model.rpn.anchor_sizes", "model.roi_heads.box_coder_weights"]
)
def test_another_network_is_refused(run_path, pond, field):
    sizes = coco_config(pond).model.rpn.anchor_sizes
    value = {
        "model.box_loss": "smooth_l1",
        "model.rpn.anchor_sizes": tuple(tuple(size / 2 for size in level) for level in sizes),
        "model.roi_heads.box_coder_weights": (5.0, 5.0, 5.0, 5.0),
    }[field]
    with pytest.raises(ValueError, match=rf"--config describes another network .*config\.{field} is "):
        evaluate(run_path, pond, **{field: value, "postprocess.voting": "none"})


def test_parameters_of_another_shape_are_refused(run_path, pond):
    (run_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoints: does not fit the model; .*another shape"):
        evaluate(run_path, pond, **{"model.box_head.features": 24})


def test_other_classes_are_refused(run_path, pond):
    classes = read_json(run_path / "classes.json")
    write_json(run_path / "classes.json", classes | {"names": classes["names"][::-1]})
    with pytest.raises(ValueError, match=r"was trained on the classes .*the same classes in the same order"):
        evaluate(run_path, pond)


def test_another_split_has_no_part_in_what_is_best(run_path, pond):
    assert "AP" in evaluate(run_path, pond, **{"data.eval_split": "train"})[""]
    names = set().union(*read_metrics(run_path / "metrics.jsonl"))
    assert "train/AP" in names
    assert not scores(Workdir(run_path), "AP")


def test_what_chooses_among_proposals_may_change(run_path, pond):
    fields = {"model.rpn.nms_threshold": 0.5, "model.box_loss_settings.ramp_steps": 7}
    found = evaluate(run_path, pond, **fields)[""]
    assert list(scores(Workdir(run_path), "AP").values()) == [pytest.approx(found["AP"])]
