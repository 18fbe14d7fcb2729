"""`--mode=calibrate`: fits a factor for the stds of each edge, on images that no training or report uses."""

from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from klbox_jax import distributed
from klbox_jax.data.loader import check_fits
from klbox_jax.data.plan import EvalPlan
from klbox_jax.distributed import is_writer
from klbox_jax.evaluation.temperature import calibrate_detections
from klbox_jax.files import read_json, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.job import Job
from klbox_jax.train.run_evaluation import Evaluation
from klbox_jax.train.workdir import current_versions

# With this many boxes, the standard error of the share of labels within one std is 3 %: sqrt(.68 * .32 / 250).
ENOUGH_BOXES = 250


def calibrate(job: Job, settings: PostprocessSettings, *, step: int | None = None) -> dict[str, Any]:
    """Fits the temperature of a checkpoint's stds under a post-processing, and writes it.

    The result is `calibration/<step>.json` in the workdir: the temperature, which evaluations and predictions of this
    checkpoint apply, and its provenance. A later fit of the same checkpoint replaces it.

    Args:
        job: the run.
        settings: the post-processing of the detections.
        step: step of the checkpoint; by default the newest sound one.

    Returns:
        The content of the file; see `fit_temperatures`.

    Raises:
        ValueError, CheckpointError: see `fit_temperatures`.
    """
    found = fit_temperatures(job, {"": settings}, step=step)[""]
    if is_writer():
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
    return found


def fit_temperatures(
    job: Job, settings: Mapping[str, PostprocessSettings], *, step: int | None = None
) -> dict[str, dict[str, Any]]:
    """Fits the temperature of a checkpoint's stds under each post-processing, from one forward pass.

    The images are those that `config.data.hold_out` kept out of the training, or else the `calibration_split`.

    Returns:
        For each name of the settings: the results of `klbox_jax.evaluation.temperature.calibrate_detections`, with
        `step`, `seed`, `data`, `data_fingerprint`, `postprocess` and `versions`.

    Raises:
        ValueError: the head has no variances, there are no images to calibrate on, or no detection is correct.
        CheckpointError: there is no checkpoint.
    """
    _check_same_training_data(job)
    job.check(settings.values())
    loss = job.model.roi_heads.box_loss
    if not loss.has_variances:
        raise ValueError(
            f"config.model.box_loss = {loss.name!r} predicts no variances, so there is nothing to calibrate; train "
            "with a loss that predicts them, such as kl"
        )
    source, method = job.calibration_source, job.config.calibrate.method
    plan = EvalPlan(check_fits(source, job.preprocessing), batch_size=job.config.evaluation.batch_size)
    step, params = restore_params(job.workdir.checkpoints, step)
    params = jax.device_put(params, distributed.replicated(job.mesh))
    results = Evaluation(job, settings).detections(params, source, plan, step=step)
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
        }
        if found[name]["num_matched"] < ENOUGH_BOXES:
            logging.warning(
                "%s gave %d matched detections; below %d, coverage after calibration may be off by more than 3 points",
                source.name,
                found[name]["num_matched"],
                ENOUGH_BOXES,
            )
    return found


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
