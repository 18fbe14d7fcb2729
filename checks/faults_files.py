"""Inspects the folder and the log of a run that was killed, or that went on to its end."""

import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from klbox_jax.files import read_json
from klbox_jax.train.checkpoints import find_fault, find_steps
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics

# Metrics that depend on the clock.
CLOCKS = ("time", "train/seconds", "train/data_wait_share")


def whole_steps(checkpoints: pathlib.Path) -> list[int]:
    """Returns the steps whose save is complete."""
    return [step for step in find_steps(checkpoints) if (checkpoints / str(step) / "digests.json").exists()]


def unfinished_saves(checkpoints: pathlib.Path) -> set[int]:
    """Returns the steps whose save has begun and not ended: a temporary folder, or no digests yet."""
    names = os.listdir(checkpoints) if checkpoints.exists() else []
    temporary = {int(name.partition(".")[0]) for name in names if ".orbax-checkpoint-tmp" in name}
    steps = {int(name) for name in names if name.isdecimal()}
    whole = {step for step in steps if (checkpoints / str(step) / "digests.json").exists()}
    # An older step without digests is being deleted.
    return temporary | {step for step in steps - whole if step > max(whole, default=-1)}


def lost_checkpoints(checkpoints: pathlib.Path, whole: set[int], *, keep: int) -> list[int]:
    """Returns the steps, of the newest `keep` that were ever whole, that are missing or damaged now."""
    return [step for step in sorted(whole)[-keep:] if find_fault(checkpoints / str(step))]


def half_written(workdir: pathlib.Path) -> list[str]:
    """Returns the JSON files of a run that cannot be read, and whole lines of metrics.jsonl that are not JSON."""
    found = []
    for path in sorted(workdir.rglob("*.json")):
        if ".orbax-checkpoint-tmp" not in str(path):
            try:
                read_json(path)
            except ValueError:
                found.append(str(path.relative_to(workdir)))
    metrics = Workdir(workdir).metrics
    if metrics.exists():
        # A line that a kill interrupted has no end; readers skip it.
        for line in metrics.read_text("utf-8").split("\n")[:-1]:
            try:
                json.loads(line)
            except ValueError:
                found.append(f"{metrics.name}: {line[:60]!r}")
    return found


def resumed_from(log: str) -> int | None:
    """Returns the step from which a start went on, by its log; None if it was killed before."""
    found = re.search(r"from step (\d+) to \d+, batch|is trained to its last step, (\d+)", log)
    return None if found is None else int(found[1] or found[2])


def last_recorded_step(workdir: pathlib.Path) -> int:
    """Returns the last step of metrics.jsonl; 0 if there is none."""
    metrics = Workdir(workdir).metrics
    return max((record["step"] for record in read_metrics(metrics)), default=0) if metrics.exists() else 0


def damage(folder: pathlib.Path, rng: np.random.Generator, *, how: str) -> str:
    """Damages the largest file of a checkpoint that has a digest, and returns its name.

    `how` is `flip`, of one bit, or `truncate`, to half of the length.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "digests.json")
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    else:
        content = content[: len(content) // 2]
    path.write_bytes(content)
    return str(path.relative_to(folder))


def state_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a checkpoint, those of the optimizer too, by their names."""
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        tree = handler.metadata(folder).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def different_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    """Returns the names under which two states do not hold the same bits."""

    def bits(array: np.ndarray | None) -> tuple | None:
        return None if array is None else (array.dtype, array.shape, array.tobytes())

    return sorted(name for name in ours | theirs if bits(ours.get(name)) != bits(theirs.get(name)))


def training_records(workdir: Workdir) -> list[dict[str, Any]]:
    """Returns the logged metrics of each step, without those that depend on the clock."""
    return [
        {name: value for name, value in record.items() if name not in CLOCKS}
        for record in read_metrics(workdir.metrics)
        if "train/total_loss" in record
    ]


def differences(reference: pathlib.Path, run: pathlib.Path, *, step: int) -> list[str]:
    """Returns the differences between a run that finished at a step and the undisturbed one, in words."""
    found = [f"{name} cannot be read" for name in half_written(run)]
    theirs, ours = Workdir(reference), Workdir(run)
    if fault := find_fault(ours.checkpoints / str(step)):
        return [*found, f"checkpoint {step}: {fault}"]
    states = [state_of(each.checkpoints / str(step) / "default") for each in (ours, theirs)]
    arrays = different_arrays(*states)
    if arrays:
        found.append(f"{len(arrays)} arrays of the state, {arrays[0]} among them")
    if training_records(ours) != training_records(theirs):
        found.append("the losses of metrics.jsonl")
    files = [each.eval_dir(step) / "detections.json" for each in (ours, theirs)]
    if files[0].read_bytes() != files[1].read_bytes():
        found.append(files[0].name)
    return found
