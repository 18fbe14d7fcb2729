"""`--mode=calibrate`: fits a factor to the stds of each edge, on images that are neither trained on nor reported."""

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

# The share of labels within one std is known to 3 points of 100 from so many boxes: sqrt(.68 * .32 / 250).
ENOUGH_BOXES = 250


def calibrate(job: Job, settings: PostprocessSettings, *, step: int | None = None) -> dict[str, Any]:
    """Fits the temperature of a checkpoint's stds under a post-processing, and writes it.

    `calibration/<step>.json` in the workdir then has the temperature, which evaluations and predictions of this
    checkpoint apply, and all that is needed to tell where it comes from; the last fit of a checkpoint counts.

    Args:
        job: the run.
        settings: the post-processing that detections are to be made with.
        step: of the checkpoint; by default the newest that is sound.

    Returns:
        What is written, see `fit_temperatures`.

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
        By the name of the settings what `klbox_jax.evaluation.temperature.calibrate_detections` returns, and `step`,
        `seed`, `data`, `data_fingerprint`, `postprocess` and `versions`.

    Raises:
        ValueError: the head has no variances, there are no images to calibrate on, or no detection is right.
        CheckpointError: there is no checkpoint.
    """
    _check_is_the_run(job)
    job.check(settings.values(), train=False, evaluate=True)
    loss = job.model.roi_heads.box_loss
    if not loss.has_variances:
        raise ValueError(
            f"config.model.box_loss = {loss.name!r} predicts no variances, so there is nothing to calibrate; train "
            "with a loss that has them, such as kl"
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
            "data_fingerprint": getattr(source, "fingerprint", None),
            "postprocess": vars(settings[name]),
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


def _check_is_the_run(job: Job) -> None:
    """Raises ValueError where the config tells of another training than the run's own, by which it is judged."""
    if not job.workdir.config.exists():
        return
    trained = {"hold_out": 0.0} | read_json(job.workdir.config)["data"]
    given = {"hold_out": 0.0} | job.config.data.to_dict()
    for field in ("train_split", "hold_out"):
        if trained[field] != given[field]:
            raise ValueError(
                f"config.data.{field} = {given[field]!r}, but {job.workdir.path} was trained with "
                f"{trained[field]!r}, which tells what may be calibrated on; calibrate with that value, or train anew"
            )
