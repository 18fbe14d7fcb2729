"""Checkpoints of the training state, with a proof that their bytes are the ones that were written.

Orbax writes them; it finishes a save by renaming a temporary folder, so a killed save leaves no half
checkpoint under a final name. It does not notice a byte that changes later. So every step also keeps
`digests.json`, the SHA-256 of each of its files, written once the save is final and checked before anything
is restored. The order of a save is: orbax's files, the digests, and only then the deletion of older steps; a
step without digests was cut short.

    checkpoints/.saved_before         there was a whole save: the run has something to lose
    checkpoints/1000/default/...      orbax's files
    checkpoints/1000/digests.json     {"default/...": sha256, ...}
    checkpoints/2000.unsound/         a damaged step that a restore has passed over
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

    For the one run that trains in the folder: it clears away what interrupted saves have left. Everything
    else reads with `restore_params`. With several processes, all of them call every method. A save is done
    when `save` returns.
    """

    def __init__(self, directory: str | os.PathLike, *, max_to_keep: int):
        """Opens the folder, which is made where it is missing; keeps the newest `max_to_keep` steps.

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
                    # Old steps may only go once the new one has its digests, which orbax does not know of.
                    preservation_policy=ocp.checkpoint_managers.preservation_policy.PreserveAll(),
                    # A save in the background could be cut off between its last file and its digests.
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
        """Saves the state under its own step; nothing happens if this object has just saved or restored it.

        Raises:
            CheckpointError: the folder already holds this step or a later one, which was not restored; or the
                disk is full or cannot be written to, and then the earlier checkpoints are as they were.
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
        except (OSError, ValueError) as error:  # tensorstore tells of a full disk by a ValueError
            self._discard(step)
            left = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be saved: {error.__cause__ or error}; those before it are as "
                f"they were (steps {left}); free space on the disk, or make the folder writable, and start again: the "
                "same command goes on from the last checkpoint"
            ) from error
        _wait_for_all_processes(f"digests_{step}")
        self._current_step = step
        with as_workdir_error(self.directory):
            for old in sorted(self._manager.all_steps())[: -self.max_to_keep]:
                if old not in self._protected:
                    self._manager.delete(old)

    def protect(self, *steps: int) -> None:
        """Keeps steps whatever their age, and those that were protected before no longer."""
        self._protected = frozenset(steps)

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Restores the newest sound checkpoint, bit for bit.

        A damaged or incomplete checkpoint is passed over with a warning that names the file at fault; once an
        older one is restored, its folder is renamed to `<step>.unsound`, so that the run can save that step
        again.

        Args:
            abstract_state: a state of arrays or `jax.ShapeDtypeStruct`, whose shapes, dtypes and shardings
                the restored arrays take.

        Raises:
            CheckpointError: there are checkpoints but none is sound; there is no checkpoint; or the sound one
                holds other arrays than `abstract_state`, in which case the message lists them.
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
        """Returns when every save and deletion is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases orbax's threads."""
        self._manager.close()

    def _write(self, step: int, state: TrainState) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        if is_writer():
            folder = self.directory / str(step)
            write_json(folder / _DIGESTS, {name: _sha256(folder / name) for name in _file_names(folder)})
            (self.directory / _SAVED_BEFORE).touch()

    def _discard(self, step: int) -> None:
        """Gives back the space of a save that failed, as far as that is possible."""
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
        step: which one; by default the newest that is sound.

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
    """Returns what is wrong with a step's folder, naming the file; None if it is sound."""
    digests = folder / _DIGESTS
    if not digests.exists():
        return f"{_DIGESTS} is missing, so the save was cut short"
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
    """Returns the newest step whose files are the ones that were written, or None; warns of those passed over."""
    for step in reversed(find_steps(directory)):
        fault = find_fault(directory / str(step))
        if fault is None:
            return step
        logging.warning("checkpoint %s is not sound and is passed over: %s", directory / str(step), fault)
    return None


def _step_to_restore(directory: pathlib.Path) -> int:
    """Process 0 looks, so that all processes restore the same step."""
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
    """Orbax would convert another dtype without a word, and report the first of other shapes only."""
    wanted = _shapes_and_dtypes(abstract_state)
    stored = _shapes_and_dtypes(_stored_tree(folder / _ITEM))
    names = [name for name in sorted(wanted | stored) if wanted.get(name) != stored.get(name)]
    if names:
        lines = [f"  {n}: saved {stored.get(n, 'nothing')}, wanted {wanted.get(n, 'nothing')}" for n in names]
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise CheckpointError(
            f"{folder} holds other arrays than this config makes:\n"
            + "\n".join(lines[:10] + more)
            + "\ngo back to the config it was trained with, or choose another --workdir"
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
    """A run killed inside its very first save has nothing to go back to: it begins anew.

    Wherever there is another step, or was one, `restore` decides.
    """
    steps = find_steps(directory)
    if (directory / _SAVED_BEFORE).exists():
        return
    if len(steps) == 1 and not (directory / str(steps[0]) / _DIGESTS).exists():
        logging.warning(
            "%s was cut short inside its first save, of step %d; it is set aside and the run starts from step 0",
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
