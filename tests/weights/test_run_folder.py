import json

import jax
import numpy as np
import pytest

from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.state import TrainState
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.run_folder import is_run_folder
from klbox_jax.weights.weight_file import weights_digest
from tests.thin import scenes_config, thin_model
from tests.weights.small_detector import SIDE, trained_params


@pytest.fixture(scope="module")
def params():
    return trained_params(log_vars=True)


@pytest.fixture
def run(tmp_path, params):
    """A run with checkpoints of the steps 3 and 5."""
    folder = tmp_path / "run"
    with Checkpoints(folder / "checkpoints", max_to_keep=3) as checkpoints:
        for step in (3, 5):
            scaled = jax.tree.map(lambda leaf, step=step: np.asarray(leaf * step, np.float32), params)
            state = TrainState(step=np.asarray(step, np.int32), params=scaled, opt_state={})
            checkpoints.save(jax.tree.map(jax.numpy.asarray, state))
    (folder / "config.json").write_text(json.dumps(scenes_config("loss=kl").to_dict()))
    return folder


def _load(params, path):
    model = thin_model("loss=kl")
    fresh = jax.tree.map(lambda leaf: np.full_like(leaf, -7.0), params)
    coders = {"box_coder": model.roi_heads.box_coder, "rpn_box_coder": model.rpn.box_coder}
    return load_weights(fresh, path, **coders, pooled_side=SIDE)


def _check(loaded, params, factor):
    for value, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(value, wanted * factor, rtol=1e-6)


def test_the_newest_sound_checkpoint_of_a_run_is_read(run, params):
    assert is_run_folder(str(run))
    loaded, report = _load(params, run)
    _check(loaded, params, 5)
    assert (report.provenance.source, report.reinitialized, report.unused) == ("klbox_jax", {}, ())
    newest = weights_digest(run)
    digests = run / "checkpoints/5/digests.json"
    name = next(iter(json.loads(digests.read_text())))
    (run / "checkpoints/5" / name).write_bytes(b"damaged")
    loaded, _ = _load(params, run)
    _check(loaded, params, 3)
    assert weights_digest(run) != newest
    (run / "checkpoints/3/digests.json").unlink()
    with pytest.raises(WeightFileError, match=r"run: none of its checkpoints is sound"):
        _load(params, run)


def test_a_folder_that_is_no_run(run, tmp_path, params):
    (run / "config.json").write_text('{"model": {}}')
    with pytest.raises(
        WeightFileError, match=r"run: its checkpoint of step 5 cannot be read .* --mode=export"
    ) as caught:
        _load(params, run)
    assert "\n" not in str(caught.value)
    (run / "config.json").unlink()
    with pytest.raises(WeightFileError, match=r"is a folder without model\.safetensors"):
        _load(params, run)
