"""Reading of the parameters of a run's newest checkpoint, as weights of another training."""

import hashlib
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from klbox_jax.files import read_json
from klbox_jax.models.build import build_model
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.safetensors_file import CONVENTIONS, model_metadata

# Fields of `config.model` that older runs do not have, and their values then.
_ADDED_FIELDS = {"dtype": "float32"}


def is_run_folder(path: str) -> bool:
    """Returns True for a folder with a config.json and checkpoints."""
    folder = pathlib.Path(path)
    return (folder / "config.json").is_file() and bool(_steps(folder))


def newest_checkpoint(path: str) -> tuple[int, str]:
    """Returns the newest step of a run whose files have their digests, and the path of the digests.

    Raises:
        WeightFileError: no checkpoint is sound.
    """
    folder = pathlib.Path(path)
    for step in _steps(folder):
        digests = folder / "checkpoints" / str(step) / "digests.json"
        if _is_sound(digests):
            return step, str(digests)
    raise WeightFileError(f"{path}: none of its checkpoints is sound; give another run or a weight file.")


def read_run_folder(path: str) -> tuple[dict[str, np.ndarray], str]:
    """Returns the parameters of a run's newest sound checkpoint by their paths, and the conventions of its network.

    Raises:
        WeightFileError: no checkpoint is sound, or the config is not one of this version.
    """
    step, digests = newest_checkpoint(path)
    try:
        config = ml_collections.ConfigDict(_with_tuples(read_json(pathlib.Path(path) / "config.json")))
        for field, value in _ADDED_FIELDS.items():
            if field not in config.model:
                config.model[field] = value
        # The number of classes has no part in the conventions.
        conventions = model_metadata(build_model(config.model, num_classes=1))[CONVENTIONS]
        params = _read_params(pathlib.Path(digests).parent / "default")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightFileError(
            f"{path}: its checkpoint of step {step} cannot be read ({type(error).__name__}: {reason}); export it with "
            "--mode=export, and give the exported folder."
        ) from error
    state = {"/".join(name): np.asarray(value, np.float32) for name, value in flatten_dict(params).items()}
    return state, conventions


def _steps(folder: pathlib.Path) -> list[int]:
    """Returns the steps that have a checkpoint, newest first."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return sorted((int(step.name) for step in found if step.name.isdecimal() and step.is_dir()), reverse=True)


def _is_sound(digests: pathlib.Path) -> bool:
    try:
        expected = read_json(digests)
        for name, digest in expected.items():
            with (digests.parent / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except (OSError, ValueError, AttributeError):
        return False
    return bool(expected)


def _read_params(folder: pathlib.Path) -> Any:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = {"params": ocp.PyTreeCheckpointHandler().metadata(folder).tree["params"]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        arguments = ocp.args.PyTreeRestore(item=stored, restore_args=as_numpy, partial_restore=True)
        return checkpointer.restore(folder, args=arguments)["params"]


def _with_tuples(value: Any) -> Any:
    """Returns a value of JSON with tuples in place of lists, as configs have them."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
