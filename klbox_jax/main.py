"""Command line: one config, one folder, one mode.

    python -m klbox_jax.main --config=configs/scenes.py:loss=kl --workdir=runs/kl --mode=train_and_eval

Any field of the config can be set from the shell: `--config.optimizer.learning_rate=0.01`.
"""

import logging as py_logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from klbox_jax import distributed
from klbox_jax.data.build import cache_folder
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.checkpoints import CheckpointError, restore_params
from klbox_jax.train.evaluation import Evaluation
from klbox_jax.train.job import Job
from klbox_jax.train.loop import train
from klbox_jax.train.workdir import Workdir

MODES = ("train", "eval", "train_and_eval")


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
        mode: `train`, `eval` (of the newest checkpoint) or `train_and_eval`.
        settings: post-processings to evaluate, by name; that of the config by default, under the name "".
        allow_config_change: go on in a folder that was begun under another config.

    Returns:
        The metrics of each setting; nothing after `train`.

    Raises:
        ValueError, CheckpointError, FloatingPointError: with one clear sentence; see `Job` and `train`.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    job = Job(config=config, workdir=Workdir(workdir))
    settings = settings or {"": PostprocessSettings(**config.postprocess)}
    job.check(settings.values(), train=mode != "eval", evaluate=mode != "train")
    if mode == "eval":
        # Takes no lock, and so may look at a run that is still training.
        step, params = restore_params(job.workdir.checkpoints)
        return Evaluation(job, settings)(jax.device_put(params, distributed.replicated(job.mesh)), step)
    _use_compilation_cache()
    with job.workdir.lock():
        job.workdir.prepare(config.to_dict(), allow_config_change=allow_config_change)
        evaluation = None if mode == "train" else Evaluation(job, settings)
        state = train(job, evaluate=evaluation)
        return {} if mode == "train" else evaluation(state.params, int(state.step))


def _use_compilation_cache() -> None:
    """Keeps compiled programs, so that a resumed run starts at once; the user may have chosen another place."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def exit_with_one_line(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Wraps a program's main: what is wrong with config, data, weights or folder ends in one line and status 1."""

    def wrapped(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError("Too many command-line arguments.")
        try:
            main(argv)
        except (ValueError, CheckpointError, FloatingPointError) as error:
            if os.environ.get("KLBOX_TRACEBACK"):
                raise
            logging.flush()
            sys.exit(f"error: {error}\n(set KLBOX_TRACEBACK=1 to see where it was raised)")

    return wrapped


def set_up_logging() -> None:
    """Shows this package's messages, and of its chattier libraries only errors."""
    logging.set_verbosity(logging.INFO)
    libraries = ("orbax", "grain", "tensorflow_datasets", "etils", "/jax/_src/")

    def is_ours(record) -> bool:
        return record.levelno >= py_logging.ERROR or not any(name in record.pathname for name in libraries)

    logging.get_absl_handler().addFilter(is_ours)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; an unknown field of the config ends in one line instead of a traceback."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")


def _main(argv: list[str]) -> None:
    del argv
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
    flags.mark_flags_as_required(["config", "workdir"])
    set_up_logging()
    app.run(exit_with_one_line(_main), flags_parser=parse_flags)
