"""The examples of docs/extend.md are complete files that run without a change to the package."""

import json
import pathlib
import re
import runpy

import pytest

from klbox_jax.data import build
from klbox_jax.data.scenes import ScenesSource

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = re.findall(r"## (A .+?)\n.*?```python\n(.*?)```", (ROOT / "docs/extend.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """Prepares a few scenes once, in place of the thousands of the config."""
    root = tmp_path_factory.mktemp("scenes")

    def make(_, split, **fields):
        few = {"train": 16, "validation": 4, "calibration": 4, "test": 4}
        return ScenesSource(root, split, **fields | few)

    return make


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_the_example_runs(title, code, few_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ScenesSource", few_scenes)
    file = tmp_path / "example.py"
    file.write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    runpy.run_path(str(file), run_name="__main__")
    (metrics,) = tmp_path.glob("runs/*/eval/4/metrics.json")
    assert json.loads(metrics.read_text())["AP"] is not None


def test_there_are_four_examples():
    assert [title for title, _ in EXAMPLES] == ["A loss", "A voting", "A backbone", "A data set"]
