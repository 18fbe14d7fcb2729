"""The folder of a run: its config, its versions, its lock, and where everything else in it lies.

    config.json      the config that the run was started with
    config.N.json    the configs it had before, where a change was allowed
    classes.json     names and category ids of the classes that it learns
    versions.json    the libraries and devices it was started on
    weights.json     the file that its parameters were started from, and what became of it
    checkpoints/     see `checkpoints.py`
    metrics.jsonl    see `writer.py`
    tensorboard/     the same numbers as event files
    profile/         a trace of `config.train.profile_steps`
    eval/<step>/     what the evaluation of a checkpoint wrote
    calibration/     the temperature of a checkpoint's stds, as <step>.json

Only process 0 of a run writes.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

import klbox_jax
from klbox_jax.distributed import is_writer
from klbox_jax.errors import WorkdirError
from klbox_jax.files import as_workdir_error, read_json, to_json, write_json

# What may differ between two starts of one run without changing what it learns.
FREE_FIELDS = (
    "calibrate",
    "data.calibration_split",
    "data.num_threads",
    "evaluation",
    "export",
    "postprocess",
    "predict",
    "train.eval_every",
    "train.keep_best",
    "train.keep_best_checkpoints",
    "train.keep_checkpoints",
    "train.log_every",
    "train.profile_steps",
    "train.save_every",
)

# Fields that configs once did not have, and what runs of that time did: such a run goes on as it began.
ADDED_FIELDS = {
    "data.calibration_split": "",
    "data.class_names": [],
    "data.hold_out": 0.0,
    "data.mask_size": 0,
    "data.on_bad_record": "stop",
    "data.skip_empty_boxes": False,
    "data.tfds_name": "",
    "model.dtype": "float32",
    "train.accumulate_steps": 1,
    "train.early_stopping_patience": 0,
    "train.on_nonfinite": "stop",
}

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
    """Paths and house-keeping of one run's folder. Making the object touches nothing."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).absolute()

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """The file of the training metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """The folder of the TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> pathlib.Path:
        """The folder of the trace that `config.train.profile_steps` asks for."""
        return self.path / "profile"

    @property
    def config(self) -> pathlib.Path:
        """The file of the run's config."""
        return self.path / "config.json"

    @property
    def classes(self) -> pathlib.Path:
        """The file of the classes: `names` and `category_ids`, in the order of the dense class index."""
        return self.path / "classes.json"

    @property
    def versions(self) -> pathlib.Path:
        """The file of the library versions and devices that the run was started on."""
        return self.path / "versions.json"

    @property
    def weights(self) -> pathlib.Path:
        """The file that tells which foreign weights the run started from, if any."""
        return self.path / "weights.json"

    def eval_dir(self, step: int) -> pathlib.Path:
        """Returns the folder for the results of evaluating the checkpoint of `step`."""
        return self.path / "eval" / str(step)

    def calibration_file(self, step: int) -> pathlib.Path:
        """Returns the file of the temperature that was fitted to the stds of the checkpoint of `step`."""
        return self.path / "calibration" / f"{step}.json"

    def prepare(
        self,
        config: Mapping[str, Any],
        *,
        allow_config_change: bool = False,
        free_fields: tuple[str, ...] = FREE_FIELDS,
    ) -> None:
        """Makes the folder ready for a run with this config, or refuses; never touches checkpoints.

        On first use writes config.json and versions.json. Later compares, and where the change is free or
        allowed writes the new config; an allowed change keeps the old file as `config.N.json`.

        Args:
            config: nested dictionary of strings, numbers, booleans, None, tuples and lists.
            allow_config_change: go on under a config that differs.
            free_fields: dotted names; these fields and everything below them may always differ.

        Raises:
            WorkdirError: the path is a file; config.json cannot be read or is missing beside checkpoints; or
                fields differ, each of which the message lists.
        """
        self._check_is_folder()
        new = json.loads(to_json(config, self.config))
        if self.config.exists():
            try:
                old = read_json(self.config)
            except ValueError as error:
                raise WorkdirError(f"{error}; restore that file or choose another --workdir") from None
            changes = _differences(_with_added_fields(old, new), new)
            bound = [name for name in changes if not _is_free(name, free_fields)]
            lines = "\n".join(f"  {name}: {changes[name]}" for name in bound)
            if bound and not allow_config_change:
                raise WorkdirError(
                    f"{self.path} belongs to a run with another config:\n{lines}\n"
                    "choose another --workdir, or go on under the new config with --allow_config_change"
                )
            if bound:
                logging.warning("%s goes on under a changed config:\n%s", self.path, lines)
                if is_writer():
                    write_json(self._free_config_name(), old)
            if changes and is_writer():
                write_json(self.config, new)
            self._warn_of_other_versions()
            return
        if self.checkpoints.exists() and any(self.checkpoints.iterdir()) and not allow_config_change:
            raise WorkdirError(
                f"{self.path} has checkpoints but no config.json to compare with; restore that file, choose "
                "another --workdir, or vouch for the config with --allow_config_change"
            )
        if is_writer():
            write_json(self.versions, current_versions())
            write_json(self.config, new)

    def keep_classes(
        self, names: Sequence[str], category_ids: Sequence[int], *, allow_change: bool = False
    ) -> None:
        """Writes classes.json, or refuses where the run has learnt other classes.

        The head knows a class by its index alone: where a data set's classes were renamed or reordered, a
        training that went on would teach each output another class.

        Args:
            names: of the data set's classes, in the order of the dense class index.
            category_ids: the data set's own ids, in the same order; these may differ from the run's.
            allow_change: go on with other names.

        Raises:
            WorkdirError: the names differ from those in classes.json, or that file cannot be read.
        """
        if self.classes.exists():
            try:
                kept = read_json(self.classes)["names"]
            except (ValueError, TypeError, KeyError):
                raise WorkdirError(
                    f"{self.classes} does not hold the names of a run's classes; restore or delete that file"
                ) from None
            if kept != list(names):
                change = f"{self.path} was trained on the classes {kept}, but the data set has {list(names)}"
                if not allow_change:
                    raise WorkdirError(
                        f"{change}; choose another --workdir, restore the data set, or go on with these classes "
                        "with --allow_config_change"
                    )
                logging.warning("%s", change)
        if is_writer():
            write_json(self.classes, {"names": names, "category_ids": category_ids})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one training process; a process that dies, however it dies, lets go.

        Raises:
            WorkdirError: another process holds it, or the path is a file.
        """
        self._check_is_folder()
        if not is_writer():
            yield
            return
        path = self.path / ".lock"
        with as_workdir_error(path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise WorkdirError(
                    f"{self.path} is being trained in by {holder}; wait for it, stop it, or choose another "
                    "--workdir"
                ) from None
            with as_workdir_error(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
            yield

    def _check_is_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise WorkdirError(f"{self.path} is a file, not a folder; choose another --workdir")

    def _free_config_name(self) -> pathlib.Path:
        number = 1
        while (path := self.path / f"config.{number}.json").exists():
            number += 1
        return path

    def _warn_of_other_versions(self) -> None:
        if not self.versions.exists():
            return
        try:
            changes = _differences(read_json(self.versions), json.loads(json.dumps(current_versions())))
        except ValueError as error:
            logging.warning("%s", error)
            return
        if changes:
            lines = "\n".join(f"  {name}: {change}" for name, change in changes.items())
            logging.warning("%s was started on other versions; results may differ:\n%s", self.path, lines)


def current_versions() -> dict[str, Any]:
    """Returns the versions of Python and the libraries, and the count of each kind of device."""
    devices = Counter(f"{device.platform}: {device.device_kind}" for device in jax.devices())
    return {
        "python": platform.python_version(),
        "klbox_jax": klbox_jax.__version__,
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "devices": dict(devices),
        "processes": jax.process_count(),
    }


_ABSENT = object()


def _differences(old: Any, new: Any, name: str = "") -> dict[str, str]:
    """Returns 'was X, now Y' for the dotted name of each leaf that differs; both come from JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = {}
        for key in sorted(old.keys() | new.keys()):
            inner = f"{name}.{key}" if name else key
            changes |= _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), inner)
        return changes
    # True == 1 in Python, but not in a config.
    if old == new and isinstance(old, bool) == isinstance(new, bool):
        return {}
    return {name: f"was {_show(old)}, now {_show(new)}"}


def _with_added_fields(old: Any, new: Any, prefix: str = "") -> Any:
    """Fills `ADDED_FIELDS` into a config that lacks them, where the new config has them."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return old
    names = {key: f"{prefix}{key}" for key in new}
    added = {
        key: ADDED_FIELDS[name] for key, name in names.items() if name in ADDED_FIELDS and key not in old
    }
    return added | {
        key: _with_added_fields(value, new.get(key), f"{prefix}{key}.") for key, value in old.items()
    }


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def _is_free(name: str, free_fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(field + ".") for field in free_fields)
