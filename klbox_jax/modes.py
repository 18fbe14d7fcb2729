"""The modes of a run: training, evaluation, calibration, prediction and export.

The command line (`klbox`, `python -m klbox_jax.main`) and the experiments call them. This module imports jax and the
whole package; `klbox_jax.main` does so only when it runs a mode.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from klbox_jax import distributed
from klbox_jax.compilation import use_compilation_cache
from klbox_jax.config.overrides import with_local_paths
from klbox_jax.data.build import build_source
from klbox_jax.data.hold_out import EmptyPartError
from klbox_jax.data.layout import find_layout
from klbox_jax.data.source import Source
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.best_checkpoint import best_checkpoint
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.checks import check_evaluation_config
from klbox_jax.train.extensions import Extensions
from klbox_jax.train.job import Job
from klbox_jax.train.loop import train
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.state import TrainState
from klbox_jax.train.workdir import Workdir

# Post-processings by name; the name "" is that of the config.
Settings = Mapping[str, PostprocessSettings]


def make_job(config: Any, workdir: str, *, trains: bool = False, extensions: Extensions | None = None) -> Job:
    """Returns the parts of a run; raises ValueError for a path of another machine."""
    use_compilation_cache()
    extensions = extensions or Extensions()
    return Job(with_local_paths(config), Workdir(workdir), trains=trains, extensions=extensions)


def settings_of(config: Any) -> dict[str, PostprocessSettings]:
    """Returns the post-processing of a config, under the name ""."""
    return {"": PostprocessSettings(**config.postprocess)}


def without_empty_hold_out(job: Job, settings: Settings, *, evaluates: bool) -> Job:
    """Returns a training job that trains on all images if its hold-out is empty or all of a small data set."""
    job.check_without_data(settings.values(), evaluates=evaluates)
    try:
        _ = job.train_source
    except EmptyPartError as error:
        logging.warning("%s; here all images are trained on, and sigma is not calibrated", error)
        config = job.config.copy_and_resolve_references()
        config.data.hold_out = 0.0
        return dataclasses.replace(job, config=config)
    return job


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What a training does besides training.

    Attributes:
        evaluates: evaluate during the training and at its end.
        calibrates: calibrate the stds at the end, before the last evaluation, if there are images to do it on.
        allow_config_change: accept a folder whose run was started with another config.
    """

    evaluates: bool = True
    calibrates: bool = False
    allow_config_change: bool = False


def run_training(job: Job, settings: Settings, options: TrainOptions) -> dict[str, dict[str, Any]]:
    """Trains, and evaluates and calibrates if the options say so; returns the metrics of each setting.

    The folder belongs to the run once nothing of its start can fail any more. A start that fails leaves it as it was.
    """
    change = options.allow_config_change
    job.workdir.check_config(job.config.to_dict(), allow_config_change=change)
    job.check(settings.values(), evaluates=options.evaluates)
    classes, ids = job.train_source.class_names, job.train_source.category_ids
    job.workdir.check_classes(classes, allow_change=change)

    def claim() -> None:
        job.workdir.prepare(job.config.to_dict(), allow_config_change=change)
        job.workdir.keep_classes(classes, ids, allow_change=change)

    with job.workdir.lock(), Preemption() as preemption:
        evaluation = None
        if options.evaluates:
            from klbox_jax.train.run_evaluation import Evaluation

            evaluation = Evaluation(job, settings, preemption=preemption)
        state = train(job, evaluate=evaluation, claim=claim, preemption=preemption)
        if options.calibrates:
            calibrate_after_training(job, settings, state, evaluation, preemption=preemption)
        return evaluation(state.params, int(state.step)) if evaluation else {}


def calibrate_after_training(
    job: Job, settings: Settings, state: TrainState, evaluation: Any, *, preemption: Preemption
) -> None:
    """Calibrates the stds of the last checkpoint; says in one line why if that is not possible.

    Args:
        job: the run.
        settings: its only post-processing, by name.
        state: the last state.
        evaluation: an `Evaluation` of the settings, whose compiled step is used; None to compile one.
        preemption: source of stop signals.
    """
    from klbox_jax.serving.calibrate import fit_detections, write_calibration
    from klbox_jax.train.run_evaluation import Evaluation

    data, step = job.config.data, int(state.step)
    if not job.model.roi_heads.box_loss.has_variances:
        return
    if not (data.get("hold_out", 0.0) or data.get("calibration_split", "")):
        logging.warning(
            "sigma is not calibrated, because no images are kept for it; later do klbox calibrate %s --data=FOLDER",
            job.workdir.path,
        )
        return
    if job.workdir.calibration_file(step).exists():
        return
    evaluation = evaluation or Evaluation(job, settings, preemption=preemption)
    try:
        found = fit_detections(
            job, evaluation, settings, params=state.params, source=job.calibration_source, step=step
        )
        (only,) = found.values()
        write_calibration(job, only)
    except ValueError as error:  # a short training may find no object
        logging.warning("sigma is not calibrated: %s", error)


def run_evaluation(job: Job, settings: Settings) -> tuple[dict[str, dict[str, Any]], pathlib.Path]:
    """Evaluates a checkpoint; returns the metrics of each setting, and the folder of the step.

    Takes no lock, so that it can read a run that is still training.

    Raises:
        ValueError: the folder of a setting holds an evaluation of other data or under other settings.
    """
    from klbox_jax.serving.model_folder import check_same_network
    from klbox_jax.train.run_evaluation import Evaluation

    job.check(settings.values())
    step, params = restore_params(job.workdir.checkpoints, checkpoint_step(job))
    check_same_network(job, params)
    with Preemption() as preemption:
        evaluation = Evaluation(job, settings, preemption=preemption)
        metrics = evaluation(jax.device_put(params, distributed.replicated(job.mesh)), step)
        return metrics, job.workdir.eval_dir(step)


def run_calibration(
    job: Job, settings: PostprocessSettings, *, other_data: Any = None, split: str = ""
) -> pathlib.Path:
    """Calibrates the stds of a checkpoint; returns the file of the calibration.

    Args:
        job: the run.
        settings: the post-processing.
        other_data: a `config.data` of another labelled folder; by default the images that the config keeps out.
        split: split of the other folder.
    """
    from klbox_jax.serving.calibrate import calibrate

    source: Source | None = None
    if other_data is not None:
        source = build_source(other_data, split, job.extensions.sources)
    with Preemption() as preemption:
        found = calibrate(job, settings, step=checkpoint_step(job), source=source, preemption=preemption)
    return job.workdir.calibration_file(found["step"])


def only_split(data: Any) -> str:
    """Returns the only split of the folder of a `config.data`; raises ValueError if it has several."""
    splits = tuple(find_layout(data.root).splits)
    if len(splits) != 1:
        raise ValueError(f"{data.root} has the splits {', '.join(splits)}; choose one with --split")
    return splits[0]


def run_prediction(job: Job, inputs: Sequence[str] = ()) -> pathlib.Path:
    """Predicts on photographs; returns the folder of the results.

    Args:
        job: the run.
        inputs: images, folders or globs; by default `config.predict.input`.
    """
    from klbox_jax.serving.predict_mode import predict

    with Preemption() as preemption:
        return predict(job, inputs, step=checkpoint_step(job), preemption=preemption)


def run_export(job: Job, settings: PostprocessSettings) -> pathlib.Path:
    """Exports a checkpoint; returns the folder of the files."""
    from klbox_jax.serving.export import export

    return export(job, settings, step=checkpoint_step(job))


def checkpoint_step(job: Job) -> int | None:
    """Returns the step of the checkpoint that `config.evaluation.checkpoint` names, None for the newest."""
    check_evaluation_config(job.config)
    if job.config.evaluation.checkpoint == "last":
        return None
    return best_checkpoint(job.workdir, job.config.train.keep_best)
