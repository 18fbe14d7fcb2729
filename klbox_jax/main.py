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
from klbox_jax.files import cache_folder
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.best_checkpoint import best_checkpoint
from klbox_jax.train.checkpoints import restore_params
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
) -> dict[str, dict[str, Any]]:
    """Runs one mode of one config in one folder; the command line and the experiments both come here.

    Args:
        config: what `get_config` of a file in configs/ returns.
        workdir: folder of the run. The same folder resumes.
        mode: `train`, `eval` (of the newest checkpoint, or of the best one), `train_and_eval`, `calibrate` (fits
            temperatures to the stds of that checkpoint), `predict` (on photographs) or `export` (writes a
            program that runs without this package).
        settings: post-processings to evaluate, by name, a single one to calibrate or to export; that of the config by
            default, under the name "".
        allow_config_change: go on in a folder that was begun under another config.

    Returns:
        The metrics of each setting where the mode evaluates, otherwise nothing.

    Raises:
        ValueError, CheckpointError, FloatingPointError: with one clear sentence; see `Job`, `train` and `predict`.
        Preempted: a signal stopped it, and the same command goes on.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    _use_compilation_cache()
    job = Job(config=config, workdir=Workdir(workdir))
    settings = settings or {"": PostprocessSettings(**config.postprocess)}
    match mode:
        case "train" | "train_and_eval":
            evaluates = mode == "train_and_eval"
            return _train(job, settings, evaluates=evaluates, allow_config_change=allow_config_change)
        case "eval":
            return _evaluate(job, settings)
        case "calibrate":
            return _calibrate(job, settings)
        case "predict":
            return _predict(job)
        case "export":
            return _export(job, settings)


def _train(
    job: Job, settings: Mapping[str, PostprocessSettings], *, evaluates: bool, allow_config_change: bool
) -> dict[str, dict[str, Any]]:
    job.check(settings.values(), train=True, evaluate=evaluates)
    with job.workdir.lock(), Preemption() as preemption:
        job.workdir.prepare(job.config.to_dict(), allow_config_change=allow_config_change)
        job.workdir.keep_classes(
            job.train_source.class_names, job.train_source.category_ids, allow_change=allow_config_change
        )
        evaluation = _evaluation(job, settings, preemption) if evaluates else None
        state = train(job, evaluate=evaluation, preemption=preemption)
        return evaluation(state.params, int(state.step)) if evaluates else {}


# What only some modes need is imported there: a training starts without it.


def _evaluation(job: Job, settings: Mapping[str, PostprocessSettings], preemption: Preemption):
    from klbox_jax.train.run_evaluation import Evaluation

    return Evaluation(job, settings, preemption=preemption)


def _evaluate(job: Job, settings: Mapping[str, PostprocessSettings]) -> dict[str, dict[str, Any]]:
    """Takes no lock, and so may look at a run that is still training."""
    from klbox_jax.serving.model_folder import check_same_network

    job.check(settings.values(), train=False, evaluate=True)
    step, params = restore_params(job.workdir.checkpoints, _chosen_step(job))
    check_same_network(job, params)
    with Preemption() as preemption:
        evaluation = _evaluation(job, settings, preemption)
        return evaluation(jax.device_put(params, distributed.replicated(job.mesh)), step)


def _chosen_step(job: Job) -> int | None:
    """Returns the step of the best checkpoint where the config asks for it, None for the newest."""
    job.check_evaluation()
    best = job.config.evaluation.checkpoint == "best"
    return best_checkpoint(job.workdir, job.config.train.keep_best) if best else None


def _calibrate(job: Job, settings: Mapping[str, PostprocessSettings]) -> dict[str, dict[str, Any]]:
    from klbox_jax.serving.calibrate import calibrate

    (chosen,) = settings.values()
    calibrate(job, chosen, step=_chosen_step(job))
    return {}


def _predict(job: Job) -> dict[str, dict[str, Any]]:
    """Asks for no data set: the workdir has all that photographs need."""
    from klbox_jax.serving.predict_mode import predict

    with Preemption() as preemption:
        predict(job, step=_chosen_step(job), preemption=preemption)
    return {}


def _export(job: Job, settings: Mapping[str, PostprocessSettings]) -> dict[str, dict[str, Any]]:
    from klbox_jax.serving.export import export

    (chosen,) = settings.values()
    export(job, chosen, step=_chosen_step(job))
    return {}


def _use_compilation_cache() -> None:
    """Keeps compiled programs, so that what was run before starts at once; the user may have chosen another place."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _main(argv: list[str]) -> None:
    del argv
    # Tracing makes many objects and hardly any cycles: by default a quarter of its time goes into looking for them.
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
        "coordinator_address",
        None,
        "host:port of process 0; with the next two, where no launcher tells them.",
    )
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
    _PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.start(_main)
