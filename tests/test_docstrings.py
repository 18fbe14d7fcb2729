"""A docstring opens with a verb and its object, or with the name of the thing; never with a relative clause."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("klbox_jax", "configs", "experiments", "benchmarks", "checks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OPENINGS = {"what", "which", "how", "whether", "where", "those", "that", "whoever"}


def first_words(path):
    """Yields the line and the first word of each docstring of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words:
                yield getattr(node, "lineno", 1), words[0].strip(".,:;`").lower()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_opens_with_a_relative_clause(path):
    # The painter of the scenes is frozen to the byte.
    if path.name == "scene_painter.py":
        return
    found = [f"line {line}: {word}" for line, word in first_words(path) if word in OPENINGS]
    assert not found, f"{path}: open these docstrings with a verb and its object: {found}"
