import json

import jax
import numpy as np
import pytest

from experiments import small_checkpoint
from experiments.small_checkpoint import write_small_checkpoint
from klbox_jax.serving.predictor import load
from klbox_jax.train.checkpoints import restore_params
from tests.coco_folder import CATEGORIES, write_folder
from tests.serving.thin_run import write_run
from tests.thin import coco_config

FILES = {"config.json", "classes.json", "model.safetensors", "provenance.json"}


def test_a_run_becomes_a_small_folder(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "pond", images_per_shape=1)
    config = coco_config(root, "loss=kl", **{"data.canvases": ((96, 96),), "evaluation.batch_size": 4})
    workdir = write_run(tmp_path / "run", config)
    provenance = write_small_checkpoint(workdir, tmp_path / "small")
    assert {path.name for path in (tmp_path / "small").iterdir()} == FILES
    assert json.loads((tmp_path / "small" / "provenance.json").read_text()) == provenance
    assert json.loads((tmp_path / "small" / "classes.json").read_text()) == {
        "names": [category["name"] for category in CATEGORIES],
        "category_ids": [category["id"] for category in CATEGORIES],
    }
    assert (provenance["step"], provenance["seed"], provenance["training_seconds"]) == (3, config.seed, 0.0)
    assert provenance["metrics"].keys() == {"float32", "float16"}
    assert all(0 <= ap <= 100 for metrics in provenance["metrics"].values() for ap in metrics.values())

    predictor = load(tmp_path / "small")
    assert predictor.step == 3
    _, params = restore_params(workdir.checkpoints)
    for value, exact in zip(jax.tree.leaves(predictor.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(value, np.asarray(exact).astype(np.float16).astype(np.float32))
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    assert provenance["weights"]["parameters"] == count
    # Two bytes for each number, and the header.
    assert 2 * count < provenance["weights"]["bytes"] < 2 * count + 20_000

    monkeypatch.setattr(small_checkpoint, "MAX_SIZE", 1000)
    with pytest.raises(ValueError, match=r"take [\d,]+ bytes in float16, above 1,000$"):
        write_small_checkpoint(workdir, tmp_path / "large")
    assert not (tmp_path / "large").exists()
