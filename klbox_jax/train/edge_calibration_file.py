"""Writes and reads the intervals and score curves of a checkpoint, next to its temperature."""

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from klbox_jax.errors import WorkdirError
from klbox_jax.evaluation.edge_calibration import EdgeCalibration
from klbox_jax.files import read_json, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.workdir import Workdir


def edge_calibration_file(workdir: Workdir, step: int) -> pathlib.Path:
    """Returns `calibration/<step>.intervals.json`."""
    return workdir.calibration_file(step).with_suffix(".intervals.json")


def write_edge_calibration(
    workdir: Workdir, step: int, calibration: EdgeCalibration, provenance: Mapping[str, Any]
) -> None:
    """Writes the calibration of a checkpoint.

    Args:
        workdir: the folder of the run.
        step: step of the checkpoint.
        calibration: fitted to its detections.
        provenance: further fields of the file: `postprocess`, `data_fingerprint`, `versions` and others.
    """
    summary = {
        "num_labels": len(calibration.ratios),
        "num_images": int(calibration.images.max()) + 1,
        "promise": calibration.file_promise(),
    }
    write_json(edge_calibration_file(workdir, step), {**provenance, **summary, **calibration.to_dict()})


def load_edge_calibration(
    workdir: Workdir, step: int, settings: PostprocessSettings, *, data: str | None = None
) -> EdgeCalibration | None:
    """Returns the calibration of a checkpoint's detections.

    Args:
        workdir: the folder of the run.
        step: step of the checkpoint.
        settings: the post-processing of the detections.
        data: name of the data set whose images are reported, if they are.

    Returns:
        None if the checkpoint was not calibrated. Also None, with a warning, if it was calibrated under another
        post-processing, or on the reported data set. Every field counts: a score threshold decides which boxes the
        promise is about.

    Raises:
        WorkdirError: the file is damaged.
    """
    file = edge_calibration_file(workdir, step)
    if not file.exists():
        return None
    try:
        record = read_json(file)
        fitted_under = dict(record["postprocess"])
        calibration = EdgeCalibration.from_dict(record)
    except (KeyError, TypeError, ValueError) as error:
        raise WorkdirError(
            f"{file} does not hold intervals ({error}); delete it, or calibrate again with --mode=calibrate"
        ) from None
    wanted = settings.to_dict()
    differing = [name for name in wanted if fitted_under.get(name, wanted[name]) != wanted[name]]
    reason = ", ".join(f"under {name} {fitted_under[name]!r}, not {wanted[name]!r}" for name in differing)
    if data is not None and calibration.data.partition(", held out")[0] == data:
        reason = f"on {calibration.data}, whose images are evaluated here"
    if reason:
        logging.warning(
            "%s was fitted %s, so there are no intervals; calibrate again with --mode=calibrate", file, reason
        )
        return None
    return calibration
