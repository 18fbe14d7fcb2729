"""The temperature that `--mode=calibrate` left in the folder of a run."""

import numpy as np
from absl import logging
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.errors import WorkdirError
from klbox_jax.files import read_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.workdir import Workdir

# These say which detections there are, not what the std of one of them means.
_OF_THE_SELECTION = ("score_threshold", "soft_nms_min_score", "pre_nms_topk", "detections_per_image")


def load_temperature(
    workdir: Workdir, step: int, settings: PostprocessSettings
) -> Float[ndarray, "4"] | None:
    """Returns the factor on the stds of the edges `x1, y1, x2, y2` of a checkpoint's detections.

    Args:
        workdir: the folder of the run.
        step: of the checkpoint.
        settings: the post-processing that the detections are made with.

    Returns:
        None where the checkpoint was not calibrated, or, with a warning, under other suppression, voting or
        refinement, of which the std of a detection is a result. Thresholds of the score and counts of slots may
        differ.

    Raises:
        WorkdirError: the file of the calibration is damaged.
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
            f"{file} does not hold a calibration ({error}); delete it, or calibrate again with --mode=calibrate"
        ) from None
    wanted = vars(settings)
    differing = [
        name
        for name in wanted
        if name not in _OF_THE_SELECTION and fitted_under.get(name, wanted[name]) != wanted[name]
    ]
    if differing:
        changes = ", ".join(f"{name} {fitted_under[name]!r}, not {wanted[name]!r}" for name in differing)
        logging.warning(
            "%s was fitted under %s: the stds stay as the network gives them; calibrate again with --mode=calibrate",
            file,
            changes,
        )
        return None
    return temperature
