"""Configs by name, by path and of a run; in a checkout, in a wheel, and next to a user's own package `configs`."""

import pathlib
import shutil
import sys

import pytest
import setuptools

from klbox_jax.config import field_types
from klbox_jax.config.family import (
    ConfigError,
    explanations,
    family_files,
    first_line,
    load_base,
    load_config,
)
from klbox_jax.errors import WorkdirError
from tests.golden.make_configs import VARIANTS
from tests.programs import ROOT, run_python


def test_every_family_has_a_name_and_a_line():
    assert set(family_files()) == set(VARIANTS)
    assert first_line(family_files()["scenes"]).startswith("Faster R-CNN with a small GroupNorm ResNet-FPN")


@pytest.mark.parametrize(
    "text",
    ["scenes:loss=smooth_l1", "configs/scenes.py:loss=smooth_l1", f"{ROOT}/configs/scenes.py:loss=smooth_l1"],
)
def test_a_name_and_a_path_are_one(text):
    config = load_config(text)
    assert config.model.box_loss == "smooth_l1"
    assert config.data.name == "scenes"


def test_the_old_path_is_known_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/scenes.py").data.name == "scenes"


def test_a_colon_in_a_value_and_in_a_folder(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "scenes.py", folder / "mine.py")
    assert load_config(f"{folder}/mine.py:noise_scale=2").data.noise_scale == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene", r"^--config=scene: there is no config of this name; the closest is scenes "),
        ("mask_rcnn", "the closest is mask_rcnn_resnet50_fpn"),
        ("zzz", "choose one of faster_rcnn_mobilenet_v2_fpn, "),
        ("configs/scens.py", "there is no such file; the closest of the package's is scenes"),
        ("nowhere/mine.py:loss=kl", r"--config=nowhere/mine\.py: there is no such file"),
        ("scenes:los=kl", "--config=scenes:los=kl: config argument 'los=kl' is unknown"),
        ("scenes:noise_scale=much", "config argument 'noise_scale=much': expected a float"),
    ],
)
def test_a_wrong_name_is_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(arg=None)\n    pass", r"mine\.py:1 raised SyntaxError: "),
        ("import nothing_of_the_kind", r"mine\.py:1 raised ModuleNotFoundError: No module named"),
        ("\n\ndef get_config(arg=None):\n    return {}['lr']", r"mine\.py:4 raised KeyError: 'lr'"),
        ("x = 1", r"mine\.py has no function get_config\(arg\)"),
        ("def get_config(arg=None):\n    return {}", r"returned dict, not a ConfigDict"),
        ("def get_config():\n    pass", r"raised TypeError: get_config\(\) takes 0 positional arguments"),
    ],
)
def test_a_fault_of_an_own_file_is_one_line(tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(f"{tmp_path}/mine.py:loss=kl")
    assert "\n" not in str(error.value)


def test_an_own_package_of_the_same_name_comes_first_for_own_files_only(tmp_path, monkeypatch):
    """A user's project may have a folder `configs`; families still find theirs, and own files find both."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ours.py").write_text("SEED = 7\n")
    (tmp_path / "configs" / "mine.py").write_text(
        "from configs import common, ours, scenes\n\n\ndef get_config(arg=None):\n"
        "    config = scenes.get_config(arg)\n    config.seed = ours.SEED\n    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    before = {name: module for name, module in sys.modules.items() if name.startswith("configs")}
    assert load_config("configs/mine.py:size=tiny").seed == 7
    assert load_config("scenes:size=tiny").seed == 0
    assert {name: module for name, module in sys.modules.items() if name.startswith("configs")} == before


def test_a_wheel_has_the_configs_inside_the_package(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    monkeypatch.chdir(ROOT)
    exec((ROOT / "setup.py").read_text())
    for package in found["packages"]:
        folder = ROOT / found["package_dir"].get(package, package.replace(".", "/"))
        assert (folder / "__init__.py").is_file(), package
    packages = {path.parent for path in (ROOT / "klbox_jax").rglob("__init__.py")}
    assert len(found["packages"]) == len(packages) + 1
    # As a wheel installs them: no folder `configs` at the top.
    shutil.copytree(ROOT / "klbox_jax", tmp_path / "klbox_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / found["package_dir"]["klbox_jax.configs"], tmp_path / "klbox_jax" / "configs")
    code = """
        import sys
        from klbox_jax.config.family import configs_folder, load_config
        print(configs_folder(), load_config("scenes:loss=l1").model.box_loss, load_config("configs/scenes.py").seed)
        """
    output, _ = run_python("-c", code, cwd=tmp_path)
    assert output.split() == [str(tmp_path / "klbox_jax" / "configs"), "l1", "0"]


def test_a_runs_config_is_a_config(tmp_path):
    (tmp_path / "config.json").write_text('{"data": {"canvases": [[4, 8]]}, "model": {}}')
    config = load_config(str(tmp_path / "config.json"))
    assert config.data.canvases == ((4, 8),)
    assert config.data.hold_out == 0.0  # older runs do not have it
    for content, message in (("[", "is not readable as JSON"), ("[]", "does not hold a config")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(WorkdirError, match=message):
            load_config(str(tmp_path / "config.json"))


def test_the_facts_name_fields_that_exist():
    base = load_base()
    texts = explanations()
    types = field_types
    names = {
        *types.STEPS_OR_SHARES,
        *types.ELEMENT_TYPES,
        *types.LENGTHS,
        *types.PATHS,
        *types.OPTIONAL_GROUPS,
    }
    assert names <= texts.keys()
    assert pathlib.Path(base.__file__) == ROOT / "configs" / "base.py"
