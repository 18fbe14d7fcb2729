"""Reads the config, classes and parameters of a detector from the folder of a run or a shipped one."""

from typing import Any

import jax
import ml_collections
from flax.traverse_util import flatten_dict

from klbox_jax.config.saved import read_run_config
from klbox_jax.data.build import build_source
from klbox_jax.errors import WorkdirError
from klbox_jax.files import read_json
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.train.checkpoints import find_steps, restore_params
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir
from klbox_jax.weights.safetensors_file import check_params, load_params

# The weights of a shipped folder, which has no checkpoints.
WEIGHTS_FILE = "model.safetensors"
# Besides `box_loss`, prefixes of the fields of `config.model` that define the meaning of the parameters.
_MEANING = (
    "backbone.",
    "box_head.",
    "box_pooler.",
    "fpn.",
    "iou_head.enabled",
    "mask_head.",
    "mask_pooler.",
    "roi_heads.box_coder",
    "roi_heads.class_agnostic",
    "rpn.anchor_sizes",
    "rpn.aspect_ratios",
    "rpn.box_coder",
    "rpn.levels",
)


def read_config(workdir: Workdir) -> ml_collections.ConfigDict:
    """Returns the config that a run was started with, with the fields that older configs do not have.

    Raises:
        WorkdirError: the folder has no config.
    """
    return read_run_config(workdir.path)


def read_classes(
    workdir: Workdir, config: ml_collections.ConfigDict
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the names and category ids of the classes.

    They are read from classes.json. For an older run without that file they come from its config or its data set.

    Raises:
        WorkdirError: the classes are not known.
    """
    if workdir.classes.exists():
        content = read_json(workdir.classes)
        try:
            names, ids = tuple(map(str, content["names"])), tuple(map(int, content["category_ids"]))
        except (KeyError, TypeError, ValueError):
            names = ids = ()
        if not names or len(names) != len(ids):
            raise WorkdirError(
                f'{workdir.classes} must be {{"names": [...], "category_ids": [...]}}, with lists of equal length; '
                "restore that file"
            )
        return names, ids
    if names := config.data.get("class_names", ()):
        return names, tuple(range(1, len(names) + 1))
    try:
        source = build_source(config.data, config.data.eval_split)
    except (ValueError, AttributeError, OSError) as error:
        raise WorkdirError(
            f"{workdir.path} has no classes.json, and its data set cannot be read for its classes ({error}); "
            f'write {workdir.classes} as {{"names": [...], "category_ids": [...]}}, in the order of the ids'
        ) from error
    return source.class_names, source.category_ids


def read_params(
    workdir: Workdir, model: GeneralizedRCNN, canvas: tuple[int, int], step: int | None
) -> tuple[int | None, Any]:
    """Returns the step and the parameters of a checkpoint (`step`, or the newest sound one) or of a shipped file.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not sound.
        ValueError: the shipped file is of another step or damaged, or the parameters do not fit the model.
    """
    shipped = workdir.path / WEIGHTS_FILE
    if shipped.exists() and not find_steps(workdir.checkpoints):
        params, metadata = load_params(shipped)
        found = int(metadata["step"]) if metadata.get("step", "").isdecimal() else None
        if step is not None and step != found:
            raise WorkdirError(f"{shipped} is of step {found}, not {step}; leave out the step")
        step, path = found, shipped
    else:
        step, params = restore_params(workdir.checkpoints, step)
        path = workdir.checkpoints / str(step)
    key, batch = jax.random.key(0), dummy_batch(canvas)
    expected = jax.eval_shape(lambda: model.init(key, batch, method="init_all_heads"))["params"]
    check_params(params, expected, path=path)
    return step, params


def check_same_network(job: Job, params: Any) -> None:
    """Raises ValueError if a run's network differs from that of the config, or its classes from the data set's.

    Fields that select proposals and detections, and fields that only matter in training, may differ from the run.

    Args:
        job: a config, and the workdir of a run. Without config.json only the parameters are compared, and without
            classes.json no classes.
        params: parameters of a checkpoint of the run.
    """
    if job.workdir.config.exists():
        stored, given = (
            flatten_dict(config.model.to_dict(), sep=".") for config in (read_config(job.workdir), job.config)
        )
        changed = [
            f"config.model.{name} is {given[name]!r} instead of {stored[name]!r}"
            # A field that only one of them has belongs to another version of this package.
            for name in sorted(stored.keys() & given.keys())
            if (name == "box_loss" or name.startswith(_MEANING)) and stored[name] != given[name]
        ]
        if changed:
            raise ValueError(
                f"--config describes another network than the one in {job.workdir.path}: {', '.join(changed)}; give "
                "the --config that it was trained with"
            )
    # First the classes, because another number of them is another shape of a predictor.
    if job.workdir.classes.exists():
        names, _ = read_classes(job.workdir, job.config)
        if names != tuple(job.eval_source.class_names):
            raise ValueError(
                f"{job.workdir.path} was trained on the classes {names}, but {job.eval_source.name} has "
                f"{tuple(job.eval_source.class_names)}; evaluate on a data set with the same classes in the same order"
            )
    expected = jax.eval_shape(
        lambda: job.model.init(
            jax.random.key(0), dummy_batch(job.preprocessing.canvases[0]), method="init_all_heads"
        )
    )["params"]
    check_params(params, expected, path=job.workdir.checkpoints)
