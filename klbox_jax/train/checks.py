"""Checks of a config and of the parts built from it; each raises ValueError that names the field and the remedy."""

import difflib
from typing import Any

import jax

from klbox_jax.data.source import Source
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.train.best_checkpoint import FURTHER_HEADLINES, HEADLINES
from klbox_jax.train.shared_images import count_shared_images

# Values of `config.train.on_nonfinite`: what to do about a loss or a gradient that is not finite.
ON_NONFINITE = ("stop", "skip")


def check_train_config(train: Any, *, evaluates: bool) -> None:
    """Checks the fields of `config.train`, except `profile_steps`.

    Args:
        train: a `config.train`.
        evaluates: True if the run also evaluates (`--mode=train_and_eval`).
    """
    for field in ("save_every", "log_every"):
        if train[field] < 1:
            raise ValueError(f"config.train.{field} = {train[field]} must be at least 1 step")
    if train.num_steps < 0 or (not train.num_steps and train.num_epochs <= 0):
        raise ValueError(
            f"config.train.num_steps = {train.num_steps} with num_epochs = {train.num_epochs} is no training; give "
            "a positive number of steps, or 0 and a positive number of epochs"
        )
    if train.accumulate_steps < 1 or train.num_steps % train.accumulate_steps:
        raise ValueError(
            f"config.train.accumulate_steps = {train.accumulate_steps} does not divide config.train.num_steps = "
            f"{train.num_steps}; make num_steps a multiple of it, or the last batches would change nothing"
        )
    if train.on_nonfinite not in ON_NONFINITE:
        raise ValueError(
            f"config.train.on_nonfinite = {train.on_nonfinite!r} is unknown; choose {' or '.join(ON_NONFINITE)}"
        )
    if train.early_stopping_patience and not train.keep_best:
        raise ValueError(
            f"config.train.early_stopping_patience = {train.early_stopping_patience} needs a metric to watch; set "
            "config.train.keep_best, such as 'AP'"
        )
    if train.keep_best:
        _check_keep_best(train, evaluates=evaluates)


def _check_keep_best(train: Any, *, evaluates: bool) -> None:
    if train.keep_best_checkpoints < 1:
        raise ValueError(
            f"config.train.keep_best_checkpoints = {train.keep_best_checkpoints} must be at least 1; keep_best = "
            "'' keeps none"
        )
    if not train.eval_every or not evaluates:
        raise ValueError(
            f"config.train.keep_best = {train.keep_best!r} needs evaluations to choose from; set "
            "config.train.eval_every to the steps between two of them, without --no_eval, or keep_best "
            "to '' and early_stopping_patience to 0"
        )
    # Experiments evaluate under several named settings, whose metrics are called "<setting>/AP".
    if train.keep_best.rpartition("/")[2] not in (*HEADLINES, *FURTHER_HEADLINES):
        raise ValueError(
            f"config.train.keep_best = {train.keep_best!r} is unknown; choose one of "
            f"{', '.join((*HEADLINES, *FURTHER_HEADLINES))}"
        )


def check_profile_steps(steps: tuple[int, ...], *, total_steps: int) -> None:
    """Checks that `config.train.profile_steps` is empty or a range within the steps of the run."""
    if not steps:
        return
    is_pair = len(steps) == 2 and all(isinstance(step, int) for step in steps)
    if not is_pair or not 1 <= steps[0] <= steps[1] <= total_steps:
        raise ValueError(
            f"config.train.profile_steps = {steps} is no range of steps; write the first and the last one, such as "
            f"(11, 13), between 1 and {total_steps}, or () for no trace"
        )


def check_evaluation_config(config: Any) -> None:
    """Checks `config.evaluation.checkpoint`."""
    checkpoint = config.evaluation.checkpoint
    if checkpoint not in ("last", "best"):
        raise ValueError(f"config.evaluation.checkpoint = {checkpoint!r} is unknown; choose last or best")
    if checkpoint == "best" and not config.train.keep_best:
        raise ValueError(
            "config.evaluation.checkpoint = 'best' needs config.train.keep_best, the metric to choose by, such as 'AP'"
        )


def check_batch_sizes(config: Any, *, num_devices: int) -> None:
    """Checks that the batches of training and evaluation split evenly among the devices."""
    for field in ("train", "evaluation"):
        batch_size = config[field].batch_size
        if batch_size % num_devices:
            raise ValueError(
                f"config.{field}.batch_size = {batch_size} cannot be shared evenly by {num_devices} devices; "
                f"make it a multiple of {num_devices}"
            )


def check_same_classes(one: Source, other: Source) -> None:
    """Checks that two data sets have the same classes in the same order."""
    if one.class_names != other.class_names:
        raise ValueError(
            f"{one.name} has the classes {one.class_names}, but {other.name} has {other.class_names}; give both "
            "annotation files the same categories"
        )


def check_no_shared_images(calibration: Source, evaluation: Source) -> None:
    """Checks that no calibration image is in the evaluation set, by the path or the content of its file."""
    shared = count_shared_images(calibration, evaluation)
    if shared:
        raise ValueError(
            f"{shared} images of {calibration.name} are in {evaluation.name} too, whose results are reported; "
            "calibrate on images without them (config.data.calibration_split, or klbox calibrate --data)"
        )


def check_masks(model: GeneralizedRCNN, *, mask_size: int) -> None:
    """Checks that the data have masks if the detector has a mask head."""
    if model.roi_heads.mask_head is not None and mask_size == 0:
        raise ValueError(
            "config.model.mask_head.enabled = True needs the masks of the objects; set config.data.mask_size "
            "to their resolution, such as 112"
        )


def check_frozen(prefixes: tuple[str, ...], params: Any) -> None:
    """Checks that every prefix of `config.optimizer.frozen` selects a parameter.

    Args:
        prefixes: prefixes of parameter paths.
        params: pytree of the parameters or of their shapes.
    """
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    parts = {"/".join(name.split("/")[:count]) for name in names for count in range(1, name.count("/") + 1)}
    for prefix in prefixes:
        if prefix in parts or prefix in names:
            continue
        likely = difflib.get_close_matches(prefix, sorted(parts), n=3, cutoff=0.5)
        likely = likely or sorted(part for part in parts if part.count("/") <= 1)
        raise ValueError(
            f"config.optimizer.frozen has {prefix!r}, which is no prefix of a parameter of this network; use such as "
            f"{', '.join(likely)}, or leave it out"
        )


def check_label_noise(model: GeneralizedRCNN, train_source: Source) -> None:
    """Checks that the training set has the label noise of each edge if the box loss takes it from the data."""
    loss = model.roi_heads.box_loss
    needs_stds = loss.needs_label_stds and loss.label_noise == "data"
    if needs_stds and any(record.box_stds is None for record in train_source.records):
        raise ValueError(
            f"config.model.box_loss = {loss.name!r} with box_loss_settings.label_noise = 'data' "
            f"needs the label noise of each edge, which {train_source.name} does not have; set "
            "config.model.box_loss_settings.label_noise to 'pixels' or 'size', and label_noise_value"
        )
