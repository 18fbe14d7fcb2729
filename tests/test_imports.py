import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "klbox_jax").rglob("*.py"))
BASE = {"structures", "distributed", "errors", "files", "compilation", "config"}
NETWORK = BASE | {"ops", "losses", "postprocess", "models"}
# The programs next to the package, and the programs that each of them may import.
PROGRAMS = {"experiments": set(), "benchmarks": set(), "checks": {"benchmarks"}}
# What each part of the package may import of it, beside itself. One way only: none of these imports back.
MAY_IMPORT = {
    "__init__": set(),
    "structures": set(),
    "distributed": set(),
    "errors": set(),
    "files": {"errors"},
    "compilation": {"files"},
    "cli": {"errors"},
    "config": {"errors"},
    "modes": NETWORK | {"weights", "data", "evaluation", "report", "train", "serving"},
    "command": {"cli", "config", "data", "distributed", "errors", "main", "modes", "report", "train"},
    "ops": {"structures"},
    "losses": {"structures", "ops"},
    "postprocess": {"structures", "ops", "losses"},
    "models": {"structures", "ops", "losses", "postprocess"},
    "weights": NETWORK,
    "data": {"structures", "errors", "files", "config"},
    "evaluation": NETWORK | {"weights", "data"},
    "report": {"data", "evaluation", "errors", "files"},
    "train": NETWORK | {"weights", "data", "evaluation", "report"},
    "serving": NETWORK | {"weights", "data", "evaluation", "report", "train"},
    "main": {"command", "modes", "postprocess", "train"},
}


def imported_modules(path):
    """Every module a file imports, at its top or inside a function; names come as `module.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path):
    names = [name.split(".") for name in imported_modules(path)]
    return {
        name[1] for name in names if name[0] == "klbox_jax" and len(name) > 1 and name[1] != "__version__"
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    part = path.relative_to(ROOT / "klbox_jax").with_suffix("").parts[0]
    assert parts_imported(path) <= MAY_IMPORT[part] | {part}
    top_level = {name.split(".")[0] for name in imported_modules(path)}
    assert not top_level & {"tensorflow", "torch", "tests", "configs", *PROGRAMS}
    if part == "report":
        assert not top_level & {"jax", "flax"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_the_package_and_few_programs(program):
    for path in (ROOT / program).rglob("*.py"):
        top_level = {name.split(".")[0] for name in imported_modules(path)}
        assert not top_level & (PROGRAMS.keys() - {program} - PROGRAMS[program]), path
        assert "tests" not in top_level


def test_configs_import_nothing_of_the_package():
    for path in (ROOT / "configs").glob("*.py"):
        assert "klbox_jax" not in {name.split(".")[0] for name in imported_modules(path)}, path


def test_box_losses_need_jax_and_nothing_else():
    waiting, seen, outside = ["klbox_jax.losses.box_regression"], set(), set()
    while waiting:
        module = waiting.pop()
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if not path.exists():  # a name inside a module
            module, path = module.rpartition(".")[0], path.parent.with_suffix(".py")
        if module in seen:
            continue
        seen.add(module)
        for name in imported_modules(path):
            (waiting.append if name.startswith("klbox_jax.") else outside.add)(name)
    assert len(seen) > 1
    flax = {name for name in outside if name.startswith("flax")}
    assert flax <= {"flax.struct"}
    libraries = {name.split(".")[0] for name in outside - flax} - sys.stdlib_module_names
    assert libraries <= {"jax", "numpy", "jaxtyping"}
