import errno
import json
import logging
import os
import pathlib
import re
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.errors import WorkdirError
from klbox_jax.files import read_json, write_json
from klbox_jax.train import workdir as workdir_module
from klbox_jax.train.workdir import Workdir
from tests.programs import start_python

CONFIG = {
    "seed": 0,
    "model": {"box_loss": "kl", "strides": (4, 8), "mask": None, "frozen": True},
    "optimizer": {"learning_rate": 0.01},
    "data": {"num_threads": 2, "name": "scenes"},
}


def changed(**fields):
    config = json.loads(json.dumps(CONFIG))
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    return config


def read(path):
    return json.loads(path.read_text())


def test_first_use_writes_config_and_versions(tmp_path):
    workdir = Workdir(tmp_path / "runs" / "kl")
    assert not workdir.path.exists()
    workdir.prepare(CONFIG)
    assert read(workdir.config) == {**CONFIG, "model": {**CONFIG["model"], "strides": [4, 8]}}
    assert list(read(workdir.config)) == sorted(CONFIG)
    versions = read(workdir.versions)
    assert versions["numpy"] == np.__version__
    assert versions["devices"] == {"cpu: cpu": 4}
    assert versions.keys() >= {"python", "klbox_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    assert sorted(path.name for path in workdir.path.iterdir()) == ["config.json", "versions.json"]


def test_the_same_config_resumes_whether_tuple_or_list(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.prepare(CONFIG)
    before = workdir.config.stat().st_mtime_ns
    workdir.prepare(CONFIG)
    workdir.prepare(json.loads(json.dumps(CONFIG)))
    assert workdir.config.stat().st_mtime_ns == before


def test_a_run_keeps_its_classes(tmp_path, caplog):
    workdir = Workdir(tmp_path)
    workdir.keep_classes(("fish", "ray"), (3, 7))
    assert read(workdir.classes) == {"names": ["fish", "ray"], "category_ids": [3, 7]}
    # A data set's own ids are no matter of the head's.
    workdir.keep_classes(("fish", "ray"), (1, 2))
    assert read(workdir.classes) == {"names": ["fish", "ray"], "category_ids": [1, 2]}
    with pytest.raises(
        WorkdirError, match=r"on the classes \['fish', 'ray'\], but .* \['ray', 'fish'\]; choose"
    ):
        workdir.keep_classes(("ray", "fish"), (1, 2))
    assert read(workdir.classes)["names"] == ["fish", "ray"]
    with caplog.at_level(logging.WARNING):
        workdir.keep_classes(("ray", "fish"), (1, 2), allow_change=True)
    assert "was trained on the classes ['fish', 'ray']" in caplog.text
    assert read(workdir.classes)["names"] == ["ray", "fish"]


@pytest.mark.parametrize("content", ["[1", "[]", "{}"])
def test_damaged_classes_are_reported(content, tmp_path):
    workdir = Workdir(tmp_path)
    workdir.classes.write_text(content)
    with pytest.raises(WorkdirError, match=r"classes\.json .*restore or delete that file"):
        workdir.keep_classes(("fish",), (3,))
    assert workdir.classes.read_text() == content


def test_each_differing_field_is_listed(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.prepare(CONFIG)
    config = changed(model__box_loss="smooth_l1", model__strides=(4, 8, 16), model__frozen=1)
    del config["optimizer"]["learning_rate"]
    config["optimizer"]["momentum"] = 0.9
    config["data"] = None
    with pytest.raises(WorkdirError) as error:
        workdir.prepare(config)
    first, changes, remedy = re.fullmatch(
        r"(.*another config): (.*)\. (Choose .*)", str(error.value)
    ).groups()
    assert str(tmp_path) in first
    assert changes.split("; ") == [
        'data was {"name": "scenes", "num_threads": 2}, now null',
        'model.box_loss was "kl", now "smooth_l1"',
        "model.frozen was true, now 1",
        "model.strides was [4, 8], now [4, 8, 16]",
        "optimizer.learning_rate was 0.01, now absent",
        "optimizer.momentum was absent, now 0.9",
    ]
    assert "--workdir" in remedy
    assert "--allow_config_change" in remedy
    assert read(workdir.config)["model"]["box_loss"] == "kl"


def test_an_allowed_change_keeps_the_old_configs(tmp_path, caplog):
    workdir = Workdir(tmp_path)
    workdir.prepare(CONFIG)
    with caplog.at_level(logging.WARNING, "absl"):
        workdir.prepare(changed(optimizer__learning_rate=0.02), allow_config_change=True)
    assert "optimizer.learning_rate: was 0.01, now 0.02" in caplog.text
    workdir.prepare(changed(optimizer__learning_rate=0.03), allow_config_change=True)
    rates = [read(tmp_path / f"config{n}.json")["optimizer"]["learning_rate"] for n in (".1", ".2", "")]
    assert rates == [0.01, 0.02, 0.03]


def test_free_fields_change_freely(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.prepare(CONFIG)
    workdir.prepare(changed(data__num_threads=7))
    assert read(workdir.config)["data"]["num_threads"] == 7
    assert not (tmp_path / "config.1.json").exists()
    workdir.prepare(changed(data__num_threads=7, data__name="coco"), free_fields=("data",))
    with pytest.raises(WorkdirError, match=r"data.name was .coco., now .scenes."):
        workdir.prepare(CONFIG, free_fields=("data.num_threads", "data.na"))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    workdir = Workdir(tmp_path / "run")
    monkeypatch.setattr(pathlib.Path, "mkdir", fail)
    for use in (lambda: workdir.prepare(CONFIG), lambda: workdir.lock().__enter__()):
        with pytest.raises(
            WorkdirError, match=r"/run/.* cannot be written: Read-only file system; .*make it writable"
        ):
            use()


def test_a_run_that_is_older_than_a_field_goes_on(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.prepare(CONFIG | {"train": {"batch_size": 4}})
    now = {"batch_size": 4, "accumulate_steps": 1, "early_stopping_patience": 0, "on_nonfinite": "stop"}
    model = CONFIG["model"] | {"dtype": "float32"}
    workdir.prepare(CONFIG | {"train": now, "model": model})
    # But not as something else than it was.
    with pytest.raises(WorkdirError, match=r"train\.accumulate_steps was 1, now 2"):
        workdir.prepare(CONFIG | {"train": now | {"accumulate_steps": 2}})
    # Nor is it forgotten what a newer run was started with.
    workdir.prepare(CONFIG | {"train": now | {"accumulate_steps": 2}}, allow_config_change=True)
    with pytest.raises(WorkdirError, match=r"train\.accumulate_steps was 2, now 1"):
        workdir.prepare(CONFIG | {"train": now})


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(WorkdirError, match="run is a file, not a folder"):
        Workdir(tmp_path / "run").prepare(CONFIG)
    with pytest.raises(WorkdirError, match="run is a file, not a folder"), Workdir(tmp_path / "run").lock():
        raise AssertionError


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_an_unreadable_config(tmp_path, content):
    workdir = Workdir(tmp_path)
    workdir.config.write_bytes(content)
    with pytest.raises(WorkdirError, match=r"config.json is not readable as JSON .*choose another --workdir"):
        workdir.prepare(CONFIG, allow_config_change=True)
    assert workdir.config.read_bytes() == content


def test_checkpoints_without_a_config(tmp_path):
    workdir = Workdir(tmp_path)
    (workdir.checkpoints / "100").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"has checkpoints but no config.json"):
        workdir.prepare(CONFIG)
    workdir.prepare(CONFIG, allow_config_change=True)
    assert workdir.config.exists()
    assert (workdir.checkpoints / "100").exists()


def test_a_config_that_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*config.json: Out of range"):
        Workdir(tmp_path).prepare({"rate": float("nan")})
    with pytest.raises(ValueError, match="object has no JSON form"):
        Workdir(tmp_path).prepare({"rate": object()})


def test_other_versions_are_a_warning(tmp_path, caplog):
    workdir = Workdir(tmp_path)
    workdir.prepare(CONFIG)
    write_json(workdir.versions, {**read(workdir.versions), "jax": "0.1"})
    with caplog.at_level(logging.WARNING, "absl"):
        workdir.prepare(CONFIG)
    assert 'jax: was "0.1", now' in caplog.text
    workdir.versions.write_text("{")
    workdir.prepare(CONFIG)
    assert "versions.json is not readable" in caplog.text


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_module, "is_writer", lambda: False)
    workdir = Workdir(tmp_path / "run")
    workdir.prepare(CONFIG)
    with workdir.lock():
        pass
    assert not workdir.path.exists()


def test_the_lock_lets_one_in(tmp_path):
    workdir = Workdir(tmp_path / "run")
    with workdir.lock():
        with (
            pytest.raises(WorkdirError, match=rf"run is being trained in by process {os.getpid()} on"),
            workdir.lock(),
        ):
            raise AssertionError
        with Workdir(tmp_path / "other").lock():
            pass
    with workdir.lock():
        pass


def test_the_lock_dies_with_its_process(tmp_path):
    code = """
        import sys, time
        from klbox_jax.train.workdir import Workdir
        with Workdir(sys.argv[1]).lock():
            print("held", flush=True)
            time.sleep(60)
    """
    with start_python("-c", code, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(WorkdirError, match=f"process {process.pid} on"), Workdir(tmp_path).lock():
            raise AssertionError
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    with Workdir(tmp_path).lock():
        pass


def test_paths(tmp_path):
    workdir = Workdir(str(tmp_path))
    assert workdir.eval_dir(20) == tmp_path / "eval" / "20"
    assert workdir.checkpoints == tmp_path / "checkpoints"
    assert workdir.metrics == tmp_path / "metrics.jsonl"


def test_json_round_trip_of_array_numbers(tmp_path):
    path = tmp_path / "eval" / "7" / "metrics.json"
    write_json(path, {"b": np.float32(0.5), "a": np.arange(2), "c": np.bool_(True), "d": None})
    assert read_json(path) == {"a": [0, 1], "b": 0.5, "c": True, "d": None}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')


@pytest.mark.parametrize("value", [float("inf"), np.float32("nan"), np.array([np.nan]), {1, 2}, jnp.ones(2)])
def test_a_refused_value_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "metrics.json"
    write_json(path, {"AP": 1.0})
    with pytest.raises(ValueError, match=r"cannot write .*metrics.json"):
        write_json(path, {"AP": value})
    assert read_json(path) == {"AP": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_json(path, {"AP": 1.0})

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        WorkdirError, match=rf"^{path} cannot be written: No space left on device; free space .* start again"
    ):
        write_json(path, {"AP": 2.0})
    assert read_json(path) == {"AP": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{'a'}")
    with pytest.raises(ValueError, match=r"bad.json is not readable as JSON"):
        read_json(tmp_path / "bad.json")
