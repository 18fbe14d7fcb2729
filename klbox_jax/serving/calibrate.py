"""`klbox calibrate`: fits stds, intervals of edges and scores, on images that no training or report uses."""

from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from klbox_jax import distributed
from klbox_jax.data.build import build_source
from klbox_jax.data.hold_out import split_held_out
from klbox_jax.data.loader import check_fits
from klbox_jax.data.plan import EvalPlan
from klbox_jax.data.source import Source
from klbox_jax.distributed import is_writer
from klbox_jax.evaluation.edge_calibration import fit_edge_calibration
from klbox_jax.evaluation.temperature import METHODS, calibrate_detections
from klbox_jax.files import read_json, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.serving.model_folder import read_classes
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.edge_calibration_file import write_edge_calibration
from klbox_jax.train.job import Job
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.run_evaluation import Evaluation
from klbox_jax.train.shared_images import count_shared_images
from klbox_jax.train.workdir import current_versions

# With this many boxes, the standard error of the share of labels within one std is 3 %: sqrt(.68 * .32 / 250).
ENOUGH_BOXES = 250
PROVENANCE = ("step", "seed", "data", "data_fingerprint", "postprocess", "versions")


def calibrate(
    job: Job,
    settings: PostprocessSettings,
    *,
    step: int | None = None,
    source: Source | None = None,
    preemption: Preemption | None = None,
) -> dict[str, Any]:
    """Fits the temperature of a checkpoint's stds under a post-processing, and writes it.

    The results are two files in the workdir. `calibration/<step>.json` has the temperature, which evaluations and
    predictions of this checkpoint apply, and its provenance. `calibration/<step>.intervals.json` has the intervals of
    edges and the score curves. A later fit of the same checkpoint replaces them.

    Args:
        job: the run.
        settings: the post-processing of the detections.
        step: step of the checkpoint; by default the newest sound one.
        source: another data set with the run's classes to calibrate on, instead of the run's own images.
        preemption: source of stop signals; None ignores signals.

    Returns:
        The content of the first file; see `fit_temperatures`.

    Raises:
        ValueError, CheckpointError: see `fit_temperatures`.
        Preempted: a signal stopped it; nothing is written.
    """
    found = fit_temperatures(job, {"": settings}, step=step, source=source, preemption=preemption)[""]
    write_calibration(job, found)
    return found


def write_calibration(job: Job, found: dict[str, Any]) -> None:
    """Writes a calibration to the workdir, and logs what it changes."""
    edges = found.pop("edge_calibration")
    if is_writer():
        provenance = {key: found[key] for key in PROVENANCE}
        write_edge_calibration(job.workdir, found["step"], edges, provenance)
        write_json(job.workdir.calibration_file(found["step"]), found)
    logging.info(
        "step %d, %s: temperature %s from %d boxes of %s; NLL %.3f to %.3f, within one std %.3f to %.3f",
        found["step"],
        found["method"],
        ", ".join(f"{factor:.3f}" for factor in found["temperature"]),
        found["num_matched"],
        found["data"],
        found["before"]["NLL"],
        found["after"]["NLL"],
        found["before"]["coverage_1sigma"],
        found["after"]["coverage_1sigma"],
    )
    logging.info("%s", edges.file_promise())


def fit_temperatures(
    job: Job,
    settings: Mapping[str, PostprocessSettings],
    *,
    step: int | None = None,
    source: Source | None = None,
    preemption: Preemption | None = None,
) -> dict[str, dict[str, Any]]:
    """Fits the temperature of a checkpoint's stds under each post-processing, from one forward pass.

    The images are those of `source`, or those that `config.data.hold_out` kept out of the training, or else the
    `calibration_split`.

    Returns:
        For each name of the settings: the results of `klbox_jax.evaluation.temperature.calibrate_detections`, with
        `step`, `seed`, `data`, `data_fingerprint`, `postprocess` and `versions`; and the record `edge_calibration`.

    Raises:
        ValueError: the head has no variances, there are no images to calibrate on, images of the training or of the
            evaluation set are among them, or no detection is correct.
        CheckpointError: there is no checkpoint.
        Preempted: a signal stopped it.
    """
    check_method(job.config.calibrate.method)
    _check_same_training_data(job)
    job.check(settings.values(), evaluates=source is None)
    loss = job.model.roi_heads.box_loss
    if not loss.has_variances:
        raise ValueError(
            f"config.model.box_loss = {loss.name!r} predicts no variances, so there is nothing to calibrate; train "
            "with a loss that predicts them, such as kl"
        )
    if source is None:
        source = job.calibration_source
    else:
        _check_unseen(job, source)
    step, params = restore_params(job.workdir.checkpoints, step)
    params = jax.device_put(params, distributed.replicated(job.mesh))
    return fit_detections(
        job,
        Evaluation(job, settings, preemption=preemption),
        settings,
        params=params,
        source=source,
        step=step,
    )


def fit_detections(
    job: Job,
    evaluation: Evaluation,
    settings: Mapping[str, PostprocessSettings],
    *,
    params: Any,
    source: Source,
    step: int,
) -> dict[str, dict[str, Any]]:
    """Detects in the images of a source and fits the temperatures; see `fit_temperatures`.

    Args:
        job: the run.
        evaluation: runs the network under the settings.
        settings: the post-processings by name.
        params: parameters of the checkpoint, on all devices.
        source: the images to calibrate on.
        step: step of the checkpoint.
    """
    method = job.config.calibrate.method
    plan = EvalPlan(check_fits(source, job.preprocessing), batch_size=job.config.evaluation.batch_size)
    results = evaluation.detections(params, source, plan, step=step)
    truth = source.coco_ground_truth()
    found = {}
    for name, entries in results.items():
        found[name] = calibrate_detections(truth, entries, method=method) | {
            "step": step,
            "seed": job.config.seed,
            "data": source.name,
            "data_fingerprint": source.fingerprint,
            "postprocess": settings[name].to_dict(),
            "versions": current_versions(),
            "edge_calibration": fit_edge_calibration(truth, entries, data=source.name),
        }
        if found[name]["num_matched"] < ENOUGH_BOXES:
            logging.warning(
                "%s gave %d matched detections; below %d, coverage after calibration may be off by more than 3 points",
                source.name,
                found[name]["num_matched"],
                ENOUGH_BOXES,
            )
    return found


def check_method(method: str) -> None:
    """Raises ValueError unless `config.calibrate.method` is known."""
    if method not in METHODS:
        raise ValueError(f"config.calibrate.method = {method!r} is unknown; choose {' or '.join(METHODS)}")


def _check_unseen(job: Job, source: Source) -> None:
    """Raises ValueError if a data set has other classes than the run, or images of its training or evaluation set."""
    if job.workdir.classes.exists():
        names, _ = read_classes(job.workdir, job.config)
        if names != tuple(source.class_names):
            raise ValueError(
                f"{job.workdir.path} was trained on the classes {names}, but {source.name} has "
                f"{tuple(source.class_names)}; calibrate on a data set with the same classes in the same order"
            )
    data = job.config.data
    for purpose, split in (("evaluated", data.eval_split), ("trained", data.train_split)):
        try:
            own = build_source(data, split, job.extensions.sources)
        except (ValueError, OSError) as error:
            logging.warning(
                "split %s of the run cannot be read, so it is not known whether images of %s were %s on (%s)",
                *(split, source.name, purpose, error),
            )
            continue
        if purpose == "trained" and data.get("hold_out", 0.0):
            own = split_held_out(own, data.hold_out)[0]
        shared = count_shared_images(source, own)
        if shared:
            raise ValueError(
                f"--data: {shared} of the {len(source.records)} images of {source.name} are in {own.name} too, on "
                f"which {job.workdir.path.name} is {purpose}; calibrate on other images"
            )


def _check_same_training_data(job: Job) -> None:
    """Raises ValueError if the training split or the hold-out differs from the one stored in the run."""
    if not job.workdir.config.exists():
        return
    trained = {"hold_out": 0.0} | read_json(job.workdir.config)["data"]
    given = {"hold_out": 0.0} | job.config.data.to_dict()
    for field in ("train_split", "hold_out"):
        if trained[field] != given[field]:
            raise ValueError(
                f"config.data.{field} = {given[field]!r}, but {job.workdir.path} was trained with "
                f"{trained[field]!r}, which decides the calibration images; calibrate with that value, or train again"
            )
