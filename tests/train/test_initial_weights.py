"""A run that starts from a foreign checkpoint."""

import hashlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from klbox_jax.train import init_or_restore
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.state import TrainState
from klbox_jax.train.workdir import Workdir
from klbox_jax.weights.restricted_unpickler import WeightFileError
from tests.thin import scenes_config, thin_model
from tests.train.toy import JobOf
from tests.weights import small_detector
from tests.weights.test_torch_file import write_zip

# The detector of tests/weights/small_detector.py, over scenes.
FIELDS = {
    "model.backbone": {
        "name": "bottleneck_resnet",
        "stage_blocks": small_detector.BLOCKS,
        "stage_features": small_detector.CHANNELS,
        "stem_features": 4,
        "stride_in_1x1": False,
    },
    "model.fpn": {"features": 4, "levels": (2, 3, 4, 5), "extra_levels": 0},
    "model.rpn.features": 4,
    "model.rpn.levels": (2, 3, 4, 5),
    "model.rpn.anchor_sizes": ((16.0,), (32.0,), (64.0,), (128.0,)),
    "model.rpn.aspect_ratios": (0.5, 2.0),
    "model.rpn.anchor_offset": 0.0,
    "model.box_pooler.resolution": small_detector.SIDE,
    "model.box_pooler.aligned": False,
    "model.box_head.features": 6,
    "model.mask_head": {"enabled": True, "features": 4, "num_convs": 2},
    "model.roi_heads.class_agnostic": False,
    "model.pixel_mean": (123.675, 116.28, 103.53),
    "model.pixel_std": (58.395, 57.12, 57.375),
}


@pytest.fixture(scope="module")
def trained():
    return small_detector.trained_params()


@pytest.fixture
def detector_file(tmp_path, trained):
    return write_zip(tmp_path / "detector.pth", small_detector.torchvision_state(trained))


@pytest.fixture
def backbone_file(tmp_path, trained):
    state = small_detector.torchvision_state(trained)
    names = {name: name.removeprefix("backbone.body.") for name in state}
    return write_zip(tmp_path / "backbone.pth", {new: state[old] for old, new in names.items() if old != new})


def start(tmp_path, path, **fields):
    """Parameters of a run that starts from a file, all -7 before, and its workdir."""
    fields = FIELDS | {"model.init_weights": str(path)} | fields
    model = thin_model("loss=kl", **fields)
    # Without the scenes, whose classes are not needed here.
    job = JobOf(scenes_config("loss=kl", **fields), Workdir(tmp_path / "run"), model=model)
    key, batch = jax.random.key(0), init_or_restore.dummy_batch((64, 64))
    shapes = jax.eval_shape(lambda: model.init(key, batch, key, method="train_forward"))["params"]
    fresh = jax.tree.map(lambda leaf: jnp.full(leaf.shape, -7.0, leaf.dtype), shapes)
    return init_or_restore._initial_params(job, fresh), job.workdir


def flat(params):
    return {"/".join(path): np.asarray(value) for path, value in flatten_dict(params).items()}


def check(params, trained, *, fresh):
    """Every parameter is the file's, but those that start with `fresh`."""
    theirs = flat(trained)
    for name, value in flat(params).items():
        wanted = np.full_like(value, -7.0) if name.startswith(fresh) else theirs[name]
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6, err_msg=name)


def test_a_backbone_fills_the_backbone(tmp_path, backbone_file, trained):
    params, workdir = start(tmp_path, backbone_file)
    check(params, trained, fresh=("fpn", "rpn", "roi_heads"))
    written = json.loads(workdir.weights.read_text())
    assert written["path"] == str(backbone_file)
    assert written["sha256"] == hashlib.sha256(backbone_file.read_bytes()).hexdigest()
    assert written["provenance"]["source"] == "torchvision"
    assert written["provenance"]["box_coder"] is None
    assert sorted(written["loaded"]) == sorted(name for name in flat(params) if name.startswith("backbone/"))


def test_a_detector_fills_all_that_fits(tmp_path, detector_file, trained):
    """The released result's way: boxes are coded otherwise, and variances are new."""
    params, workdir = start(tmp_path, detector_file, **{"model.init_partial": True})
    predictor = "roi_heads/box_predictor"
    check(params, trained, fresh=(f"{predictor}/bbox_pred", f"{predictor}/bbox_log_var"))
    written = json.loads(workdir.weights.read_text())
    assert set(written["reinitialized"]) == {f"{predictor}/bbox_pred", f"{predictor}/bbox_log_var"}
    assert written["provenance"]["box_coder"] == "CenterBoxCoder(weights=(10.0, 10.0, 5.0, 5.0))"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"does not fit the model.*bbox_log_var/.*set config\.model\.init_partial = True"),
        (
            {"model.init_partial": True, "model.pixel_mean": (0.0, 0.0, 0.0)},
            r"^The torchvision weights need config\.model\.pixel_mean = \(123\.675, ",
        ),
        ({"model.init_weights": "nowhere.pth"}, r"^nowhere\.pth: cannot be read"),
    ],
)
def test_what_does_not_fit_is_reported_in_one_line(tmp_path, detector_file, fields, message):
    with pytest.raises(WeightFileError, match=message) as error:
        start(tmp_path, detector_file, **fields)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_first_state_is_filled_and_an_old_one_is_not(tmp_path, monkeypatch):
    """A new run takes the file's values; a run with a checkpoint never opens the file."""
    config = scenes_config("loss=kl", **{"model.init_weights": "weights.pth"})
    job = JobOf(config, Workdir(tmp_path / "run"), model=thin_model("loss=kl"))
    compiled_for = []
    step = types.SimpleNamespace(
        compile_ahead=lambda state, batch, executor: compiled_for.append(batch.images.shape)
    )
    monkeypatch.setattr(JobOf, "train_step", step)
    monkeypatch.setattr(
        init_or_restore, "_initial_params", lambda job, params: jax.tree.map(lambda x: 0 * x + 3, params)
    )
    new = TrainState(jnp.array(0), {"w": jnp.zeros(2)}, ())
    lowered = jax.jit(lambda: new).lower()
    monkeypatch.setattr(init_or_restore, "lower_create_state", lambda *_, **__: lowered)
    monkeypatch.setattr(init_or_restore, "compile_and_create_state", lambda program, **_: program.compile()())
    checkpoints = Checkpoints(job.workdir.checkpoints, max_to_keep=1)
    first = init_or_restore.init_or_restore(job, checkpoints)
    np.testing.assert_array_equal(first.params["w"], [3, 3])
    monkeypatch.setattr(checkpoints, "latest_step", lambda: 5)
    monkeypatch.setattr(checkpoints, "restore", lambda abstract: abstract)
    assert init_or_restore.init_or_restore(job, checkpoints).params["w"].shape == (2,)
    # The step is compiled ahead in both; not where none is left.
    assert compiled_for == [(4, *config.data.canvases[0], 3)] * 2
    monkeypatch.setattr(checkpoints, "latest_step", lambda: 6)
    init_or_restore.init_or_restore(job, checkpoints)
    assert len(compiled_for) == 2
    checkpoints.close()
