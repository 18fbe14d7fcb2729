"""Runs and exports that another version of jax wrote are read, and give the detections that they gave there."""

import numpy as np
import pytest

from klbox_jax.serving.exported_detector import Detector
from klbox_jax.serving.predictor import load
from tests.versions.make import FOLDER, make_image

# Each line of jax that the project admits has one; tests/versions/make.py wrote them.
VERSIONS = sorted(path for path in FOLDER.glob("jax_*") if path.is_dir())


def expected_of(folder):
    with np.load(folder / "found.npz") as file:
        return {name: file[name] for name in file.files}


def check(expected, boxes, scores, stds):
    # Equal scores of two versions may differ in the last bits and rank otherwise: so compared by place.
    order, wanted = (np.lexsort(np.round(rows[:, :2].T)) for rows in (boxes, expected["boxes"]))
    np.testing.assert_allclose(boxes[order], expected["boxes"][wanted], atol=1e-2)
    np.testing.assert_allclose(scores[order], expected["scores"][wanted], atol=1e-4)
    np.testing.assert_allclose(stds[order], expected["stds"][wanted], rtol=1e-3)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_the_checkpoint_is_read(folder):
    expected = expected_of(folder)
    assert len(expected["scores"]) > 5
    found = load(folder / "run")(make_image())
    check(expected, found.boxes, found.scores, found.box_stds)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_the_export_is_read(folder):
    (found,) = Detector(folder / "export").detect([make_image()])
    check(expected_of(folder), found["boxes"], found["scores"], found["box_stds"])


def test_two_lines_of_jax_are_kept():
    assert {path.name.split("_")[2] for path in VERSIONS} == {"10", "12"}
