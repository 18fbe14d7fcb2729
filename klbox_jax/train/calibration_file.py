"""Reads the temperature that `klbox calibrate` wrote to the folder of a run."""

import numpy as np
from absl import logging
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.errors import WorkdirError
from klbox_jax.files import read_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.workdir import Workdir

# These fields select detections; they do not change their stds, so a calibration stays valid.
_SELECTION_FIELDS = ("score_threshold", "soft_nms_min_score", "pre_nms_topk", "detections_per_image")


def load_temperature(
    workdir: Workdir, step: int, settings: PostprocessSettings, *, data: str | None = None
) -> Float[ndarray, "4"] | None:
    """Returns the factors on the stds of the edges `x1, y1, x2, y2` of a checkpoint's detections.

    Args:
        workdir: the folder of the run.
        step: step of the checkpoint.
        settings: the post-processing of the detections.
        data: name of the data set whose images are reported, if they are.

    Returns:
        None if the checkpoint was not calibrated. Also None, with a warning, if it was calibrated under other
        suppression, voting or refinement, because these change the stds, or on the reported data set. Score thresholds
        and the number of detections may differ.

    Raises:
        WorkdirError: the calibration file is damaged.
    """
    file = workdir.calibration_file(step)
    if not file.exists():
        return None
    try:
        record = read_json(file)
        fitted_under = record["postprocess"]
        temperature = np.array(record["temperature"], np.float64)
        if temperature.shape != (4,) or not (np.isfinite(temperature) & (temperature > 0)).all():
            raise ValueError(f"{file}: temperature is {record['temperature']}, not four positive numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise WorkdirError(
            f"{file} does not hold a calibration ({error}); delete it, or calibrate again with klbox calibrate"
        ) from None
    if data is not None and str(record.get("data")).partition(", held out")[0] == data:
        logging.warning(
            "%s was fitted on %s, whose images are evaluated here, so it is not used",
            file,
            record.get("data"),
        )
        return None
    wanted = settings.to_dict()
    differing = [
        name
        for name in wanted
        if name not in _SELECTION_FIELDS and fitted_under.get(name, wanted[name]) != wanted[name]
    ]
    if differing:
        changes = ", ".join(f"{name} {fitted_under[name]!r}, not {wanted[name]!r}" for name in differing)
        logging.warning(
            "%s was fitted under %s, so it is not used; calibrate again with klbox calibrate",
            file,
            changes,
        )
        return None
    return temperature
