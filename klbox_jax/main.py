"""Runs one mode of one config in one folder; `klbox` is the command line of it.

    python -m klbox_jax.main --config=scenes:loss=kl --workdir=runs/kl --mode=train_and_eval

is the same as `klbox train runs/kl --config=scenes:loss=kl`, without the calibration at the end.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klbox_jax.postprocess.settings import PostprocessSettings
    from klbox_jax.train.extensions import Extensions

MODES = ("train", "eval", "train_and_eval", "calibrate", "predict", "export")


def run(
    config: Any,
    workdir: str,
    mode: str,
    *,
    settings: "Mapping[str, PostprocessSettings] | None" = None,
    allow_config_change: bool = False,
    extensions: "Extensions | None" = None,
) -> dict[str, dict[str, Any]]:
    """Runs one mode of one config in one folder; called by the command line and by the experiments.

    Args:
        config: result of `get_config` of a file in configs/.
        workdir: folder of the run. The same folder resumes.
        mode: `train`, `eval` (of the newest checkpoint, or of the best one), `train_and_eval`, `calibrate` (fits
            temperatures to the stds of that checkpoint), `predict` (on photographs) or `export` (writes a
            program that runs without this package).
        settings: post-processings to evaluate, by name; exactly one to calibrate or to export. The default is that of
            the config, under the name "".
        allow_config_change: accept a folder whose run was started with another config.
        extensions: losses, backbones and data sets of the user's own that the config names; None for the built-in ones.

    Returns:
        The metrics of each setting if the mode evaluates, otherwise an empty dictionary.

    Raises:
        ValueError, CheckpointError, FloatingPointError: see `Job.check`, `train` and `predict`; the message is one
            sentence with the remedy.
        Preempted: a signal stopped the run; the same command resumes it.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    # Only now, so that the command line answers before jax is imported.
    from klbox_jax import modes

    trains = mode in ("train", "train_and_eval")
    job = modes.make_job(config, workdir, trains=trains, extensions=extensions)
    settings = settings or modes.settings_of(job.config)
    match mode:
        case "train" | "train_and_eval":
            options = modes.TrainOptions(
                evaluates=mode == "train_and_eval", allow_config_change=allow_config_change
            )
            return modes.run_training(job, settings, options)
        case "eval":
            return modes.run_evaluation(job, settings)[0]
        case "calibrate":
            (chosen,) = settings.values()
            modes.run_calibration(job, chosen)
        case "predict":
            modes.run_prediction(job)
        case "export":
            (chosen,) = settings.values()
            modes.run_export(job, chosen)
    return {}


if __name__ == "__main__":
    from klbox_jax.command.program import main_of_modes

    sys.exit(main_of_modes(sys.argv[1:]))
