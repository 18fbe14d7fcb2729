"""Finds config files by name or by path, and runs their `get_config`.

`scenes:loss=kl` is a family of this package, `my_config.py:loss=kl` a file of one's own, and `runs/kl/config.json` the
config of a run; the argument behind the colon goes to `get_config`. The families are in the folder `configs`: next to
this package in a checkout, and inside it in a wheel. In every config file `from configs import common` works.
"""

import ast
import contextlib
import difflib
import importlib.util
import os
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from klbox_jax.config.saved import read_config_file

# Files of the folder that are no family.
_NO_FAMILY = ("__init__", "base", "common", "explain")


class ConfigError(ValueError):
    """A config or a field of one cannot be used; the message names it, what is allowed and the remedy."""


def configs_folder() -> pathlib.Path:
    """Returns the folder of the families."""
    package = pathlib.Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def family_files() -> dict[str, pathlib.Path]:
    """Returns the file of each family by its name."""
    return {path.stem: path for path in sorted(configs_folder().glob("*.py")) if path.stem not in _NO_FAMILY}


def first_line(file: pathlib.Path) -> str:
    """Returns the first line of the docstring of a config file."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def load_base() -> types.ModuleType:
    """Returns the module of the fields of every config, configs/base.py; imports no library."""
    with _configs_package([configs_folder()]):
        return importlib.import_module("configs.base")


def explanations() -> dict[str, str]:
    """Returns one line for each field and each group of fields, by dotted name such as `train.batch_size`."""
    with _configs_package([configs_folder()]):
        return importlib.import_module("configs.explain").explanations()


def load_config(text: str) -> Any:
    """Returns the config that `text` names, a `ConfigDict`.

    Args:
        text: the name of a family, the path of a config file in Python, each with an argument for its `get_config`
            after a colon; or the path of a run's `config.json`.

    Raises:
        ConfigError: there is no such config, or its file cannot be run; the message names the closest.
    """
    name, argument = _split(text)
    if name.endswith(".json"):
        return read_config_file(pathlib.Path(name).expanduser())
    file, is_own = _find(name)
    folders = [configs_folder()]
    if is_own:
        # The user's own package `configs`, if there is one, comes first.
        folders.insert(0, pathlib.Path.cwd() / "configs")
    with _configs_package(folders), _import_path(pathlib.Path.cwd(), file.parent):
        config = _run(file, argument, text, is_own=is_own)
    if not hasattr(config, "to_dict"):
        raise ConfigError(
            f"--config={text}: get_config of {file} returned {type(config).__name__}, not a ConfigDict; return the "
            "result of common.base, changed"
        )
    return config


def closest(name: str, known: list[str], *, count: int = 3) -> list[str]:
    """Returns the known names that are most like `name`, the best first."""
    found = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    found += [other for other in known if name and name in other and other not in found]
    return found[:count]


def _split(text: str) -> tuple[str, str | None]:
    """Splits the name or path from the argument behind the colon."""
    file = re.fullmatch(r"(.*?\.(?:py|json))(?::(.*))?", text, re.DOTALL)
    if file:
        return file[1], file[2]
    name, colon, argument = text.partition(":")
    return name, argument if colon else None


def _find(name: str) -> tuple[pathlib.Path, bool]:
    """Returns the file of a name or path, and whether it is the user's own."""
    families = family_files()
    if not name.endswith(".py"):
        if name in families:
            return families[name], False
        likely = closest(name, list(families), count=1)
        hint = f"the closest is {likely[0]}" if likely else f"choose one of {', '.join(families)}"
        raise ConfigError(
            f"--config={name}: there is no config of this name; {hint} (`klbox configs` lists all), or give the path "
            "of a file that ends in .py"
        )
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return path.absolute(), families.get(path.stem) != path.resolve()
    # A path of the checkout, given elsewhere.
    if path.parent.name == "configs" and path.stem in families:
        return families[path.stem], False
    likely = closest(path.stem, list(families), count=1)
    hint = f"; the closest of the package's is {likely[0]}" if likely else ""
    raise ConfigError(
        f"--config={name}: there is no such file{hint} (`klbox configs` lists the names that need no path)"
    )


def _run(file: pathlib.Path, argument: str | None, text: str, *, is_own: bool) -> Any:
    """Runs a config file and its `get_config`; reports every fault as one line."""

    def call() -> Any:
        module = _load_file(file)
        get_config: Callable | None = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError(f"--config={text}: {file} has no function get_config(arg)")
        return get_config(argument) if argument else get_config()

    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:  # the code is the user's
        if not is_own and isinstance(error, ValueError):
            raise ConfigError(f"--config={text}: {error}") from error
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--config={text}: {file}{_line_of(error, file)} raised {type(error).__name__}: {reason}"
        ) from error


def _load_file(file: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _line_of(error: Exception, file: pathlib.Path) -> str:
    """Returns the line of a file at which an exception was raised, as `:7`."""
    if isinstance(error, SyntaxError) and error.filename == os.fspath(file):
        return f":{error.lineno}"
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == os.fspath(file):
            line = frame.tb_lineno
        frame = frame.tb_next
    return f":{line}" if line else ""


@contextlib.contextmanager
def _configs_package(folders: list[pathlib.Path]) -> Iterator[None]:
    """Inside the block, the package `configs` is that of these folders; afterwards it is what it was."""

    def is_configs(name: str) -> bool:
        return name == "configs" or name.startswith("configs.")

    before = {name: module for name, module in sys.modules.items() if is_configs(name)}
    package = types.ModuleType("configs")
    package.__path__ = [os.fspath(folder) for folder in folders]
    for name in before:
        del sys.modules[name]
    sys.modules["configs"] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if is_configs(name)]:
            del sys.modules[name]
        sys.modules.update(before)


@contextlib.contextmanager
def _import_path(*folders: pathlib.Path) -> Iterator[None]:
    """Inside the block, modules of these folders can be imported."""
    before = list(sys.path)
    sys.path[:0] = [os.fspath(folder) for folder in folders if os.fspath(folder) not in before]
    try:
        yield
    finally:
        sys.path[:] = before
