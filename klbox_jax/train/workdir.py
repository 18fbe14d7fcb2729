"""The folder of a run: its config, versions and lock, and the paths of everything else in it.

    config.json      the config that the run was started with
    config.N.json    earlier configs, if a change was allowed
    classes.json     names and category ids of the classes
    versions.json    library versions and devices at the first start
    weights.json     the file of the initial weights, and what was loaded from it
    checkpoints/     see `checkpoints.py`
    metrics.jsonl    see `writer.py`
    tensorboard/     the same metrics as event files
    profile/         profiler trace of `config.train.profile_steps`
    eval/<step>/     detections and metrics of a checkpoint; in folders of their names if evaluations have names
    calibration/     <step>.json: temperature of a checkpoint's stds; <step>.intervals.json: intervals and score curves

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
from klbox_jax.config.paths import local_path
from klbox_jax.distributed import is_writer
from klbox_jax.errors import WorkdirError
from klbox_jax.files import as_workdir_error, read_json, to_json, write_json
from klbox_jax.train.config_changes import FREE_FIELDS, find_changes, is_free, with_added_fields

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
    """Paths of one run's folder, its config file and its lock. Making the object touches no file."""

    def __init__(self, path: str | os.PathLike):
        """Takes the path; raises WorkdirError if it is not one of this machine."""
        self.path = pathlib.Path(local_path(path, "--workdir")).absolute()

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
        """The folder of the profiler trace of `config.train.profile_steps`."""
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
        """The file of the library versions and devices at the first start of the run."""
        return self.path / "versions.json"

    @property
    def weights(self) -> pathlib.Path:
        """The file that describes the initial weights of the run, if it has any."""
        return self.path / "weights.json"

    def eval_dir(self, step: int) -> pathlib.Path:
        """Returns the folder of the evaluation results of the checkpoint of `step`."""
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
        """Prepares the folder for a run with this config; never touches checkpoints.

        The first start writes config.json and versions.json. Later starts compare the config and write the new one if
        the change is free or allowed; an allowed change keeps the old file as `config.N.json`.

        Args:
            config: nested dictionary of strings, numbers, booleans, None, tuples and lists.
            allow_config_change: accept a config that differs.
            free_fields: dotted names; these fields and everything below them may always differ.

        Raises:
            WorkdirError: the path is a file; config.json cannot be read, or is missing while there are checkpoints;
                or fields differ, and the message lists each of them.
        """
        self.check_config(config, allow_config_change=allow_config_change, free_fields=free_fields)
        new = json.loads(to_json(config, self.config))
        if self.config.exists():
            self._update_config(new, free_fields=free_fields)
            self._warn_of_other_versions()
        elif is_writer():
            write_json(self.versions, current_versions())
            write_json(self.config, new)

    def check_config(
        self,
        config: Mapping[str, Any],
        *,
        allow_config_change: bool = False,
        free_fields: tuple[str, ...] = FREE_FIELDS,
    ) -> None:
        """Raises if `prepare` with these arguments would; changes nothing."""
        self._check_is_folder()
        new = json.loads(to_json(config, self.config))
        if allow_config_change:
            return
        if self.config.exists():
            _, bound = self._compare(new, free_fields)
            if bound:
                raise WorkdirError(
                    f"{self.path} belongs to a run with another config: "
                    f"{'; '.join(f'{name} {change}' for name, change in bound.items())}. Choose another --workdir, or "
                    "go on under the new config with --allow_config_change"
                )
        elif self.checkpoints.exists() and any(self.checkpoints.iterdir()):
            raise WorkdirError(
                f"{self.path} has checkpoints but no config.json to compare with; restore that file, choose "
                "another --workdir, or accept this config with --allow_config_change"
            )

    def _compare(self, new: Any, free_fields: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
        """Returns the changes from config.json to a config, and those that are not free, by field."""
        try:
            old = read_json(self.config)
        except ValueError as error:
            raise WorkdirError(f"{error}; restore that file or choose another --workdir") from None
        changes = find_changes(with_added_fields(old, new), new)
        return changes, {name: change for name, change in changes.items() if not is_free(name, free_fields)}

    def _update_config(self, new: Any, *, free_fields: tuple[str, ...]) -> None:
        changes, bound = self._compare(new, free_fields)
        if bound:
            lines = "\n".join(f"  {name}: {change}" for name, change in bound.items())
            logging.warning("%s goes on under a changed config:\n%s", self.path, lines)
            if is_writer():
                write_json(self._free_config_name(), read_json(self.config))
        if changes and is_writer():
            write_json(self.config, new)

    def keep_classes(
        self, names: Sequence[str], category_ids: Sequence[int], *, allow_change: bool = False
    ) -> None:
        """Writes classes.json; raises if the run has learned other classes.

        The head identifies a class only by its index. If the classes of a data set were renamed or reordered, further
        training would teach each output another class.

        Args:
            names: names of the data set's classes, in the order of the dense class index.
            category_ids: the data set's own ids, in the same order; they may differ from those in the file.
            allow_change: accept other names.

        Raises:
            WorkdirError: the names differ from those in classes.json, or that file cannot be read.
        """
        change = self.check_classes(names, allow_change=allow_change)
        if change:
            logging.warning("%s", change)
        if is_writer():
            write_json(self.classes, {"names": names, "category_ids": category_ids})

    def num_classes(self) -> int:
        """Returns the number of classes that classes.json names, 0 if it names none."""
        try:
            return len(read_json(self.classes)["names"])
        except (OSError, ValueError, TypeError, KeyError):
            return 0

    def check_classes(self, names: Sequence[str], *, allow_change: bool = False) -> str:
        """Raises if `keep_classes` would; returns a sentence about other names that are allowed, else ""."""
        if not self.classes.exists():
            return ""
        try:
            kept = read_json(self.classes)["names"]
        except (ValueError, TypeError, KeyError):
            raise WorkdirError(
                f"{self.classes} does not hold the names of a run's classes; restore or delete that file"
            ) from None
        if kept == list(names):
            return ""
        change = f"{self.path} was trained on the classes {kept}, but the data set has {list(names)}"
        if not allow_change:
            raise WorkdirError(
                f"{change}; choose another --workdir, restore the data set, or go on with these classes "
                "with --allow_config_change"
            )
        return change

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder for one training process; the lock ends with the process, however that ends.

        If the block ends before the folder has a config, the folder is left as it was found.

        Raises:
            WorkdirError: another process holds the lock, or the path is a file.
        """
        self._check_is_folder()
        if not is_writer():
            yield
            return
        path = self.path / ".lock"
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
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
            try:
                yield
            finally:
                if not self.config.exists():
                    self._remove_traces(made)

    def _remove_traces(self, made: Sequence[pathlib.Path]) -> None:
        """Removes what a start left that failed before its first step, and the folders that it made."""
        with contextlib.suppress(OSError):
            if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
                self.checkpoints.rmdir()
                self.weights.unlink(missing_ok=True)
            (self.path / ".lock").unlink()
            for folder in made:
                folder.rmdir()

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
            changes = find_changes(read_json(self.versions), json.loads(json.dumps(current_versions())))
        except ValueError as error:
            logging.warning("%s", error)
            return
        if changes:
            lines = "\n".join(f"  {name}: {change}" for name, change in changes.items())
            logging.warning("%s was started on other versions; results may differ:\n%s", self.path, lines)


def current_versions() -> dict[str, Any]:
    """Returns the versions of Python and the libraries, and the number of devices of each kind."""
    devices = Counter(f"{device.platform}: {device.device_kind}" for device in jax.devices())
    return {
        "python": platform.python_version(),
        "klbox_jax": klbox_jax.__version__,
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "devices": dict(devices),
        "processes": jax.process_count(),
    }
