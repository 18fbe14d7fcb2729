"""Reading of the tensors of a weight file in any format, by the file's first bytes, and of folders."""

import hashlib
import os
import re
from collections.abc import Iterator

import numpy as np

from klbox_jax.weights.detectron_file import arrays_of, load_numpy_pickle
from klbox_jax.weights.restricted_unpickler import WeightFileError
from klbox_jax.weights.run_folder import is_run_folder, newest_checkpoint, read_run_folder
from klbox_jax.weights.safetensors_file import CONVENTIONS, read_tensors
from klbox_jax.weights.torch_file import LEGACY_START, ZIP_START, read_torch_file

# The weights of an exported folder.
WEIGHTS_FILE = "model.safetensors"
# Prefixes that wrappers of a network add to every name: DataParallel, Lightning, averaged models.
_WRAPPERS = re.compile(r"^(module|model|network|net|detector|ema|ema_model)\.")
# Parts that torch.compile and others add for a part of a network, anywhere in a name.
_INNER_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Counters of averaged models and of batch norms in training; no network reads them.
_COUNTERS = ("n_averaged", "num_updates", "initted", "step", "num_batches_tracked")


def read_weight_file(path: str) -> tuple[dict[str, np.ndarray], str]:
    """Returns the tensors of a file by name, without the prefixes of wrappers, and the config stored with them.

    Only Detectron's files have a config, a YAML text; our own files have a JSON text of their conventions instead.
    A name that ends in `.safetensors` determines the format, because these files begin with a length.

    Args:
        path: a file, an exported folder, or the folder of a run.

    Raises:
        WeightFileError: there is no readable file of weights.
    """
    if os.path.isdir(path):
        if is_run_folder(path):
            return read_run_folder(path)
        path = _file_in_folder(path)
    if path.lower().endswith(".safetensors"):
        state, metadata = read_tensors(path)
        return without_wrappers(state), metadata.get(CONVENTIONS, "")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error}); check the path.") from error
    config = ""
    if start.startswith(ZIP_START) or start == LEGACY_START:
        state = read_torch_file(path)
    else:
        root = load_numpy_pickle(path)
        state = arrays_of(root, path)
        text = dict.get(root, "cfg")
        config = text if isinstance(text, str) else ""
    return without_wrappers(state), config


def weights_digest(path: str | os.PathLike) -> str:
    """Returns the sha256 (hex) of a weight file, or of the digests of the newest checkpoint of a run's folder.

    Raises:
        WeightFileError: there is no such file.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        path = newest_checkpoint(path)[1] if is_run_folder(path) else _file_in_folder(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_wrappers(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors without the counters and the name prefixes of wrappers, as often as all names have one."""
    plain = {_INNER_WRAPPERS.sub("", name): value for name, value in state.items()}
    state = plain if len(plain) == len(state) else state
    while True:
        counters = {name for name, value in state.items() if value.ndim == 0 and name in _COUNTERS}
        state = {name: value for name, value in state.items() if name not in counters}
        match = _WRAPPERS.match(next(iter(state), ""))
        if match is None or not all(name.startswith(match[0]) for name in state):
            return state
        state = {name.removeprefix(match[0]): value for name, value in state.items()}


def without_common_prefix(state: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yields tensors without the first part that all names share, then without the second one, and so on."""
    while state:
        first = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(first) and len(name) > len(first) for name in state):
            return
        state = {name.removeprefix(first): value for name, value in state.items()}
        yield state


def _file_in_folder(path: str) -> str:
    file = os.path.join(path, WEIGHTS_FILE)
    if os.path.isfile(file):
        return file
    raise WeightFileError(
        f"{path}: is a folder without {WEIGHTS_FILE}, and not the folder of a run with checkpoints; give a weight "
        "file, an exported folder or the folder of a run."
    )
