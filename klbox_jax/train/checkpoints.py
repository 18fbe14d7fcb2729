"""Checkpoints of the training state, with SHA-256 digests that detect damaged files.

Orbax writes them. It finishes a save by renaming a temporary folder, so a killed save leaves no incomplete checkpoint
under a final name. It does not notice bytes that change later. So every step also has `digests.json`, the SHA-256 of
each of its files, written when the save is final and checked before anything is restored. A save first writes orbax's
files, then the digests, and only then deletes older steps; the save of a step without digests was interrupted.

    checkpoints/.saved_before         marks that a save was completed once
    checkpoints/1000/default/...      orbax's files
    checkpoints/1000/digests.json     {"default/...": sha256, ...}
    checkpoints/2000.unsound/         a damaged step that a restore skipped
"""

import hashlib
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from klbox_jax.distributed import is_writer
from klbox_jax.errors import CheckpointError
from klbox_jax.files import as_workdir_error, read_json, write_json
from klbox_jax.train.state import TrainState

_DIGESTS = "digests.json"
_SAVED_BEFORE = ".saved_before"
_ITEM = "default"  # orbax's name for the only item of a step


class Checkpoints:
    """Saves and restores the checkpoints of one run; a context manager.

    Only the run that trains in the folder may use it, because it removes the leftovers of interrupted saves. Anything
    else reads with `restore_params`. With several processes, all of them must call every method. A save is complete
    when `save` returns.
    """

    def __init__(self, directory: str | os.PathLike, *, max_to_keep: int):
        """Opens the folder, and makes it if it is missing; keeps the newest `max_to_keep` steps.

        Raises:
            WorkdirError: the folder cannot be written to.
        """
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep must be at least 1, not {max_to_keep}")
        self.directory = pathlib.Path(directory).absolute()
        self.max_to_keep = max_to_keep
        self._current_step: int | None = None
        self._protected: frozenset[int] = frozenset()
        with as_workdir_error(self.directory):
            if is_writer():
                for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    logging.info("removing %s, left by an interrupted save", leftover)
                    shutil.rmtree(leftover)
                _set_aside_interrupted_first_save(self.directory)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    # Old steps are deleted here, after the new step has its digests, which orbax does not know.
                    preservation_policy=ocp.checkpoint_managers.preservation_policy.PreserveAll(),
                    # A save in the background could be interrupted between its last file and its digests.
                    enable_async_checkpointing=False,
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns every step that has a checkpoint, sound or not, in ascending order."""
        return find_steps(self.directory)

    def latest_step(self) -> int | None:
        """Returns the newest step that has a checkpoint, sound or not; None if there is none to resume."""
        return max(self.steps(), default=None)

    def save(self, state: TrainState) -> None:
        """Saves the state under its own step; does nothing if this object has just saved or restored that step.

        Raises:
            CheckpointError: the folder already holds this step or a later one, which was not restored; or the disk
                is full or cannot be written to. The earlier checkpoints are unchanged.
        """
        step = int(state.step)
        if step == self._current_step:
            return
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise CheckpointError(
                f"{self.directory} already holds step {latest}, so step {step} is not saved; resume from "
                "that checkpoint, or choose another --workdir"
            )
        try:
            self._write(step, state)
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
            self._discard(step)
            left = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be saved: {error.__cause__ or error}; earlier checkpoints are "
                f"unchanged (steps {left}); free space on the disk, or make the folder writable, and start again: the "
                "same command goes on from the last checkpoint"
            ) from error
        _wait_for_all_processes(f"digests_{step}")
        self._current_step = step
        with as_workdir_error(self.directory):
            for old in sorted(self._manager.all_steps())[: -self.max_to_keep]:
                if old not in self._protected:
                    self._manager.delete(old)

    def protect(self, *steps: int) -> None:
        """Protects exactly these steps from deletion, whatever their age."""
        self._protected = frozenset(steps)

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Restores the newest sound checkpoint, bit for bit.

        A damaged or incomplete checkpoint is skipped with a warning that names the damaged file. When an older one is
        restored, the folder of the damaged one is renamed to `<step>.unsound`, so that the run can save that step
        again.

        Args:
            abstract_state: a state of arrays or `jax.ShapeDtypeStruct`; the restored arrays have its shapes, dtypes
                and shardings.

        Raises:
            CheckpointError: there is no checkpoint, none is sound, or the sound one has other arrays than
                `abstract_state`; the message lists the differences.
        """
        step = _step_to_restore(self.directory)
        folder = self.directory / str(step)
        _check_arrays(abstract_state, folder)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        if is_writer():
            for damaged in self.steps():
                if damaged > step:
                    _set_aside(self.directory / str(damaged))
        _wait_for_all_processes(f"restored_{step}")
        self._manager.reload()
        self._current_step = step
        return state

    def wait(self) -> None:
        """Waits until every save and deletion is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending work and releases orbax's threads."""
        self._manager.close()

    def _write(self, step: int, state: TrainState) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        if is_writer():
            folder = self.directory / str(step)
            write_json(folder / _DIGESTS, {name: _sha256(folder / name) for name in _file_names(folder)})
            (self.directory / _SAVED_BEFORE).touch()

    def _discard(self, step: int) -> None:
        """Deletes the files of a failed save, as far as that is possible."""
        if is_writer():
            for folder in (self.directory / str(step), *self.directory.glob(f"{step}.orbax-checkpoint-tmp*")):
                shutil.rmtree(folder, ignore_errors=True)


def find_steps(directory: str | os.PathLike) -> list[int]:
    """Returns every step that has a checkpoint in the folder, sound or not, in ascending order."""
    folders = pathlib.Path(directory).glob("[0-9]*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdecimal() and folder.is_dir())


def restore_params(directory: str | os.PathLike, step: int | None = None) -> tuple[int, Any]:
    """Reads only the parameters of a checkpoint; changes nothing in the folder.

    Args:
        directory: the folder of the checkpoints.
        step: step of the checkpoint; by default the newest sound one.

    Returns:
        The step of the checkpoint, and its parameters as nested dictionaries of NumPy arrays.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not sound.
    """
    directory = pathlib.Path(directory).absolute()
    if step is None:
        step = _step_to_restore(directory)
    elif step not in (found := find_steps(directory)):
        raise CheckpointError(
            f"{directory} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}"
        )
    elif fault := find_fault(directory / str(step)):
        raise CheckpointError(f"{directory / str(step)} is not sound: {fault}; choose another step")
    folder = directory / str(step) / _ITEM
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = {"params": _stored_tree(folder)["params"]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        arguments = ocp.args.PyTreeRestore(item=stored, restore_args=as_numpy, partial_restore=True)
        return step, checkpointer.restore(folder, args=arguments)["params"]


def find_fault(folder: pathlib.Path) -> str | None:
    """Returns the fault of a checkpoint folder, naming the file; None if it is sound."""
    digests = folder / _DIGESTS
    if not digests.exists():
        return f"{_DIGESTS} is missing, so the save was interrupted"
    try:
        expected = read_json(digests)
        if not isinstance(expected, dict) or not expected:
            return f"{_DIGESTS} lists no files"
        for name, digest in expected.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != digest:
                return f"{name} is not the file that was saved (its sha256 differs from {_DIGESTS})"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def newest_sound_step(directory: pathlib.Path) -> int | None:
    """Returns the newest step whose files match their digests, or None; warns of each step that it skips."""
    for step in reversed(find_steps(directory)):
        fault = find_fault(directory / str(step))
        if fault is None:
            return step
        logging.warning("checkpoint %s is not sound and is skipped: %s", directory / str(step), fault)
    return None


def _step_to_restore(directory: pathlib.Path) -> int:
    """Returns the newest sound step; process 0 reads, so that all processes restore the same step."""
    found = newest_sound_step(directory) if is_writer() else None
    found = -1 if found is None else found
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found >= 0:
        return found
    steps = find_steps(directory)
    if not steps:
        raise CheckpointError(f"{directory} has no checkpoint; train first, or choose another --workdir")
    raise CheckpointError(
        f"none of the checkpoints in {directory} is sound (steps {', '.join(map(str, steps))}; the warnings "
        "say why); put back a copy of one of them, or delete that folder to start from step 0"
    )


def _check_arrays(abstract_state: TrainState, folder: pathlib.Path) -> None:
    """Raises CheckpointError that lists all differing arrays.

    Orbax would convert another dtype silently, and report only the first array of another shape.
    """
    wanted = _shapes_and_dtypes(abstract_state)
    stored = _shapes_and_dtypes(_stored_tree(folder / _ITEM))
    names = [name for name in sorted(wanted | stored) if wanted.get(name) != stored.get(name)]
    if names:
        lines = [f"  {n}: saved {stored.get(n, 'nothing')}, wanted {wanted.get(n, 'nothing')}" for n in names]
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise CheckpointError(
            f"{folder} has other arrays than this config needs:\n"
            + "\n".join(lines[:10] + more)
            + "\nuse the config that it was trained with, or choose another --workdir"
        )


def _stored_tree(folder: pathlib.Path) -> dict[str, Any]:
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def _shapes_and_dtypes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(ocp.tree.str_keypath(path)): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _file_names(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside_interrupted_first_save(directory: pathlib.Path) -> None:
    """Renames the only step of a run that was killed inside its first save, so that the run starts from step 0.

    If there is, or was, another step, `restore` decides.
    """
    steps = find_steps(directory)
    if (directory / _SAVED_BEFORE).exists():
        return
    if len(steps) == 1 and not (directory / str(steps[0]) / _DIGESTS).exists():
        logging.warning(
            "%s was interrupted inside its first save, of step %d; it is set aside and the run starts from step 0",
            directory,
            steps[0],
        )
        _set_aside(directory / str(steps[0]))


def _set_aside(folder: pathlib.Path) -> None:
    number = 1
    aside = folder.with_name(f"{folder.name}.unsound")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.unsound-{number}")
    folder.rename(aside)


def _wait_for_all_processes(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
