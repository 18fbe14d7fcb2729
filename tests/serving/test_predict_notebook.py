"""The notebook runs, cell by cell, on the shipped detector, or where there is none on one that was never trained."""

import contextlib
import io
import json
import pathlib

import pytest

from klbox_jax.data.scene_painter import CLASS_NAMES
from tests.serving.thin_run import write_run
from tests.thin import scenes_config

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "predict.ipynb"
SHIPPED = ROOT / "checkpoints" / "scenes_kl"


@pytest.fixture(scope="module")
def cells():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def test_nothing_is_stored_but_the_source(cells):
    assert len(cells) == 10
    assert len({cell["id"] for cell in cells}) == 10
    for cell in cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert f'"../{SHIPPED.relative_to(ROOT)}"' in "".join(cells[1]["source"])


def test_its_cells_run(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    if not SHIPPED.exists():
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, start=1)]
        workdir = write_run(tmp_path / "run", scenes_config("loss=kl"), categories=categories)
        monkeypatch.setenv("KLBOX_FOLDER", str(workdir.path))
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{NOTEBOOK}, {cell['id']}", "exec"), names)
    assert len(names["predictions"]) == 4
    assert "without" in printed.getvalue()
    assert '"bbox_std"' in printed.getvalue().replace("'", '"')
