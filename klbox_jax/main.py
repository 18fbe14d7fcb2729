"""Command line: one config, one folder, one mode.

    python -m klbox_jax.main --config=configs/scenes.py:loss=kl --workdir=runs/kl --mode=train_and_eval

Any field of the config can be set from the shell: `--config.optimizer.learning_rate=0.01`.
"""

import gc
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from klbox_jax import cli, distributed
from klbox_jax.compilation import use_compilation_cache
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.best_checkpoint import best_checkpoint
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.checks import check_evaluation_config
from klbox_jax.train.extensions import Extensions
from klbox_jax.train.job import Job
from klbox_jax.train.loop import train
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.workdir import Workdir

MODES = ("train", "eval", "train_and_eval", "calibrate", "predict", "export")


def run(
    config: Any,
    workdir: str,
    mode: str,
    *,
    settings: Mapping[str, PostprocessSettings] | None = None,
    allow_config_change: bool = False,
    extensions: Extensions | None = None,
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
    use_compilation_cache()
    trains = mode in ("train", "train_and_eval")
    job = Job(config, Workdir(workdir), trains=trains, extensions=extensions or Extensions())
    settings = settings or {"": PostprocessSettings(**config.postprocess)}
    # Modules that only some modes need are imported there, so that the others start without them.
    match mode:
        case "train" | "train_and_eval":
            evaluates = mode == "train_and_eval"
            return _train(job, settings, evaluates=evaluates, allow_config_change=allow_config_change)
        case "eval":
            return _evaluate(job, settings)
        case "calibrate":
            from klbox_jax.serving.calibrate import calibrate

            (chosen,) = settings.values()
            calibrate(job, chosen, step=_checkpoint_step(job))
        case "predict":
            from klbox_jax.serving.predict_mode import predict

            with Preemption() as preemption:
                predict(job, step=_checkpoint_step(job), preemption=preemption)
        case "export":
            from klbox_jax.serving.export import export

            (chosen,) = settings.values()
            export(job, chosen, step=_checkpoint_step(job))
    return {}


def _train(
    job: Job, settings: Mapping[str, PostprocessSettings], *, evaluates: bool, allow_config_change: bool
) -> dict[str, dict[str, Any]]:
    job.check(settings.values(), evaluates=evaluates)
    with job.workdir.lock(), Preemption() as preemption:
        job.workdir.prepare(job.config.to_dict(), allow_config_change=allow_config_change)
        job.workdir.keep_classes(
            job.train_source.class_names, job.train_source.category_ids, allow_change=allow_config_change
        )
        if not evaluates:
            train(job, preemption=preemption)
            return {}
        from klbox_jax.train.run_evaluation import Evaluation

        evaluation = Evaluation(job, settings, preemption=preemption)
        state = train(job, evaluate=evaluation, preemption=preemption)
        return evaluation(state.params, int(state.step))


def _evaluate(job: Job, settings: Mapping[str, PostprocessSettings]) -> dict[str, dict[str, Any]]:
    """Evaluates a checkpoint. Takes no lock, so that it can read a run that is still training."""
    from klbox_jax.serving.model_folder import check_same_network
    from klbox_jax.train.run_evaluation import Evaluation

    job.check(settings.values())
    step, params = restore_params(job.workdir.checkpoints, _checkpoint_step(job))
    check_same_network(job, params)
    with Preemption() as preemption:
        evaluation = Evaluation(job, settings, preemption=preemption)
        return evaluation(jax.device_put(params, distributed.replicated(job.mesh)), step)


def _checkpoint_step(job: Job) -> int | None:
    """Returns the step of the checkpoint that `config.evaluation.checkpoint` names, None for the newest."""
    check_evaluation_config(job.config)
    if job.config.evaluation.checkpoint == "last":
        return None
    return best_checkpoint(job.workdir, job.config.train.keep_best)


def _main(argv: list[str]) -> None:
    del argv
    # Tracing makes many objects and hardly any cycles. By default a quarter of its time is spent searching for cycles.
    gc.freeze()
    gc.set_threshold(100_000)
    distributed.initialize(_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    run(_CONFIG.value, _WORKDIR.value, _MODE.value, allow_config_change=_ALLOW_CONFIG_CHANGE.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config file, with its argument after a colon.", lock_config=True
    )
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes.")
    _MODE = flags.DEFINE_enum("mode", "train_and_eval", MODES, "What to do.")
    _ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
        "allow_config_change", False, "Go on in a folder of another config."
    )
    _COORDINATOR_ADDRESS = flags.DEFINE_string(
        "coordinator_address", None, "host:port of process 0, if no launcher sets it; with the next two."
    )
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes that train together.")
    _PROCESS_ID = flags.DEFINE_integer("process_id", None, "Rank of this process, from 0.")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.start(_main)
