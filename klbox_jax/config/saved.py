"""Reads the `config.json` of a run, and fills the fields that older runs do not have."""

import copy
import functools
import json
import os
import pathlib
from typing import Any

from klbox_jax.errors import WorkdirError

# Fields that may change between two starts of a run, because they do not change what it learns.
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

# Fields that older configs do not have, with the behavior of runs at that time: such a run goes on as it began.
ADDED_FIELDS = {
    "data.allow_links": False,
    "data.annotation_file": "",
    "data.calibration_split": "",
    "data.class_names": [],
    "data.hold_out": 0.0,
    "data.image_dir": "",
    "data.mask_size": 0,
    "data.on_bad_record": "stop",
    "data.skip_empty_boxes": False,
    "data.tfds_name": "",
    "data.voc_first_pixel": 1,
    "model.dtype": "float32",
    "train.accumulate_steps": 1,
    "train.early_stopping_patience": 0,
    "train.on_nonfinite": "stop",
}


def read_config_file(file: pathlib.Path) -> Any:
    """Returns a run's config as a `ConfigDict`, with the fields that older runs do not have and tuples for lists.

    Raises:
        WorkdirError: there is no such file, or it does not hold a config.
    """
    import ml_collections

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkdirError(f"{file} does not exist; train first, or choose another --workdir") from None
    except OSError as error:
        raise WorkdirError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WorkdirError(f"{file} is not readable as JSON ({error}); restore that file") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), dict) for key in ("data", "model")
    ):
        raise WorkdirError(f"{file} does not hold a config; restore that file")
    for name, value in ADDED_FIELDS.items():
        *groups, field = name.split(".")
        group = functools.reduce(lambda inner, key: inner.get(key, {}), groups, content)
        group.setdefault(field, copy.deepcopy(value))
    return ml_collections.ConfigDict(with_tuples(content))


def read_run_config(workdir: str | os.PathLike) -> Any:
    """Returns the config that a run was started with; see `read_config_file`.

    Raises:
        WorkdirError: the folder is not that of a run.
    """
    file = pathlib.Path(workdir) / "config.json"
    if not file.is_file():
        raise WorkdirError(
            f"{workdir} is not the folder of a run: it has no config.json; train first, or choose another --workdir"
        )
    return read_config_file(file)


def with_tuples(value: Any) -> Any:
    """Returns the value with tuples instead of the lists of JSON."""
    if isinstance(value, dict):
        return {name: with_tuples(inner) for name, inner in value.items()}
    return tuple(with_tuples(inner) for inner in value) if isinstance(value, list) else value
