"""The program `klbox`: reads the command line, finds the config, and runs a mode.

It answers before it imports jax: the help, errors of the command line and of the config, and the first line of every
mode. Errors of a user are one line on standard error, with the exit status 2 for the command line and 1 for the rest.
"""

import argparse
import gc
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from klbox_jax.command import own_data
from klbox_jax.command.arguments import (
    MODES,
    UsageError,
    help_of,
    help_of_all,
    help_of_modes,
    parser_of,
    parser_of_modes,
    with_underscores,
)
from klbox_jax.config.family import ConfigError, closest, load_config
from klbox_jax.config.overrides import (
    apply_overrides,
    check_complete,
    fill_free_fields,
    split_overrides,
    with_local_paths,
)
from klbox_jax.config.paths import local_path
from klbox_jax.config.saved import read_run_config
from klbox_jax.errors import CheckpointError, Preempted, WorkdirError, one_line

Fields = Sequence[tuple[str, str | None]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `klbox` and returns its exit status."""
    return report_errors(lambda: _main(list(sys.argv[1:] if arguments is None else arguments)))


def main_of_modes(arguments: Sequence[str]) -> int:
    """Runs `python -m klbox_jax.main --mode=MODE` and returns its exit status."""
    return report_errors(lambda: _main_of_modes(list(arguments)))


def report_errors(program: Callable[[], int | None]) -> int:
    """Runs a program; prints an error of the user as one line.

    Returns:
        The exit status: 0, 1 if config, data, weights or a folder are wrong, 2 if the command line is wrong, 143 after
        SIGTERM and 130 after SIGINT.
    """
    try:
        return program() or 0
    except Preempted as stop:
        _say(f"stopped by {stop}")
        return stop.status
    except KeyboardInterrupt:
        _say("stopped by SIGINT")
        return 130
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, CheckpointError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("KLBOX_TRACEBACK"):
            raise
        is_usage = isinstance(error, UsageError | ConfigError)
        _say(f"error: {one_line(error)}")
        return 2 if is_usage else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _main(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_of_all())
        return 0
    if arguments[0] == "--version":
        from klbox_jax import __version__

        print(f"klbox {__version__}")
        return 0
    mode, *rest = arguments
    if mode not in MODES:
        likely = closest(mode, list(MODES), count=1)
        hint = f"the closest is {likely[0]}" if likely else f"choose one of {', '.join(MODES)}"
        raise UsageError(f"klbox {mode}: there is no such mode; {hint} (see klbox --help)")
    if any(argument in ("-h", "--help") for argument in rest):
        print(help_of(mode))
        return 0
    fields, others = split_overrides(rest)
    given = parser_of(mode).parse_intermixed_args(with_underscores(others))
    return _COMMANDS[mode](given, fields)


def _main_of_modes(arguments: list[str]) -> int | None:
    from klbox_jax.main import MODES as NAMES

    parser = parser_of_modes(NAMES)
    if any(argument in ("-h", "--help", "--helpfull", "--helpshort", "-help") for argument in arguments):
        print(help_of_modes(parser))
        return 0
    fields, others = split_overrides(arguments)
    given = parser.parse_args(others)
    if given.workdir is None:
        raise UsageError("--workdir is missing; write --workdir=FOLDER, the folder of the run")
    given.positional, mode = [given.workdir], given.mode
    if mode in ("train", "train_and_eval"):
        given.no_eval, given.no_calibrate = mode == "train", True
        return _train(given, fields)
    given.name = given.data = given.split = given.output = None
    return _COMMANDS[mode](given, fields)


def _take_workdir(given: argparse.Namespace, mode: str) -> str:
    """Returns the folder of the run, and removes it from the positional arguments."""
    if given.workdir is not None:
        if given.positional == [given.workdir]:
            given.positional = []
        workdir = given.workdir
    elif given.positional:
        workdir, *given.positional = given.positional
    else:
        raise UsageError(
            f"WORKDIR is missing; write klbox {mode} WORKDIR, the folder of the run, such as runs/kl"
        )
    if given.positional and mode != "predict":
        raise UsageError(
            f"klbox {mode} takes one WORKDIR, but {', '.join(map(repr, given.positional))} is given too (see klbox "
            f"{mode} --help)"
        )
    workdir = local_path(workdir, "WORKDIR")
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise WorkdirError(f"{workdir} is a file, not a folder; choose another --workdir")
    return workdir


def _read_config(given: argparse.Namespace, workdir: str, fields: Fields, *, trains: bool = False) -> Any:
    """Returns the config of `--config`, or else that of the run, with the fields of the command line, locked."""
    file = pathlib.Path(workdir) / "config.json"
    if given.config is not None:
        config, source = load_config(given.config), f"--config={given.config}"
    elif trains and not file.is_file():
        raise UsageError(
            f"{workdir} has no run to continue; for a first training name a config: --config=NAME (klbox configs lists "
            "them)"
        )
    else:
        config, source = read_run_config(workdir), str(file)
    if given.config is None or given.config.endswith(".json"):
        fill_free_fields(config)
    config.lock()
    apply_overrides(config, fields)
    check_complete(config, source=source)
    if given.config is not None and file.is_file():
        own_data.repeat_defaults(config, fields, read_run_config(workdir))
    return with_local_paths(config)


def _start(mode: str, text: str, given: argparse.Namespace | None = None) -> None:
    """Says what begins, then imports jax and sets up logging, signals and several processes."""
    _say(f"klbox {mode}: {text}")
    from absl import flags, logging

    from klbox_jax.cli import set_up_logging

    flags.FLAGS.mark_as_parsed()  # grain reads flags
    logging.use_absl_handler()
    set_up_logging()
    # Tracing makes many objects and hardly any cycles. By default a quarter of its time is spent searching for cycles.
    gc.freeze()
    gc.set_threshold(100_000)
    if given is not None:
        from klbox_jax import distributed

        distributed.initialize(given.coordinator_address, given.num_processes, given.process_id)


def _files(lines: Sequence[tuple[str | os.PathLike, str]]) -> None:
    """Prints the files to look at; only in the process that writes them."""
    from klbox_jax.distributed import is_writer

    if not is_writer():
        return
    width = max(len(os.fspath(path)) for path, _ in lines)
    print("look at:")
    for path, what in lines:
        print(f"  {os.fspath(path):{width}}  {what}", flush=True)


def _train(given: argparse.Namespace, fields: Fields) -> None:
    workdir = _take_workdir(given, "train")
    config = _read_config(given, workdir, fields, trains=True)
    is_new = not os.path.exists(os.path.join(workdir, "config.json"))
    holds_out = is_new and own_data.set_defaults(config, fields, calibrates=not given.no_calibrate, say=_say)
    _start("train", f"{'a new run in' if is_new else 'continues'} {workdir}", given)
    from klbox_jax import modes

    job = modes.make_job(config, workdir, trains=True)
    if holds_out:
        job = modes.without_empty_hold_out(job, modes.settings_of(config), evaluates=not given.no_eval)
    options = modes.TrainOptions(
        evaluates=not given.no_eval,
        calibrates=not given.no_calibrate,
        allow_config_change=given.allow_config_change,
    )
    modes.run_training(job, modes.settings_of(job.config), options)
    _show_training(job, workdir)


def _show_training(job: Any, workdir: str) -> None:
    from klbox_jax.train.checkpoints import find_steps

    step = max(find_steps(job.workdir.checkpoints), default=0)
    lines: list[tuple[str | os.PathLike, str]] = []
    metrics = job.workdir.eval_dir(step) / "metrics.json"
    if metrics.exists():
        lines.append((metrics, "AP and the quality of sigma"))
    if job.workdir.calibration_file(step).exists():
        lines.append(
            (job.workdir.calibration_file(step), "factors on sigma, which evaluations and predictions apply")
        )
    lines += [
        (job.workdir.metrics, "losses and metrics by step; the same for TensorBoard in tensorboard/"),
        (job.workdir.checkpoints / str(step), "the last checkpoint"),
        (f"klbox report {workdir}", "writes one HTML file with curves, reliability of sigma and all images"),
        (f"klbox predict {workdir} photos/", "finds objects in photographs"),
    ]
    _files(lines)


def _with_other_data(config: Any, given: argparse.Namespace, fields: Fields) -> Any:
    """Returns the `config.data` of `--data`, a folder whose layout is detected, and `--split`."""
    data = config.data.copy_and_resolve_references()
    if given.data:
        set_fields = {name for name, _ in fields}
        data.root = local_path(given.data, "--data")
        for field, value in {"name": "auto", "annotation_file": "", "image_dir": ""}.items():
            if f"data.{field}" not in set_fields and field in data:
                data[field] = value
        if not os.path.isdir(data.root):
            raise UsageError(f"--data={given.data} is not a folder; give the folder of a labelled data set")
    return data


def _evaluate(given: argparse.Namespace, fields: Fields) -> None:
    workdir = _take_workdir(given, "eval")
    config = _read_config(given, workdir, fields)
    name = given.name or ""
    if given.data or given.split:
        config.data = _with_other_data(config, given, fields)
        config.data.eval_split = given.split or config.data.eval_split
    _start("eval", f"reading {workdir}", given)
    from klbox_jax import modes
    from klbox_jax.train.evaluation_record import check_name

    if name:
        check_name(name)
    job = modes.make_job(config, workdir)
    (chosen,) = modes.settings_of(job.config).values()
    _, folder = modes.run_evaluation(job, {name: chosen})
    _files(
        [
            (folder / name / "metrics.json", "AP, calibration of sigma and more"),
            (folder / name / "detections.json", "every detection, as COCO results with bbox_std"),
            (
                f"klbox report {workdir}{f' --name={name}' if name else ''}",
                "writes one HTML file with reliability of sigma and all images",
            ),
        ]
    )


def _calibrate(given: argparse.Namespace, fields: Fields) -> None:
    workdir = _take_workdir(given, "calibrate")
    config = _read_config(given, workdir, fields)
    other = _with_other_data(config, given, fields) if given.data else None
    if given.split and not given.data:
        config.data.update(calibration_split=given.split, hold_out=0.0)
    _start("calibrate", f"reading {workdir}")
    from klbox_jax import modes

    job = modes.make_job(config, workdir)
    split = (given.split or modes.only_split(other)) if other is not None else ""
    (chosen,) = modes.settings_of(job.config).values()
    file = modes.run_calibration(job, chosen, other_data=other, split=split)
    _files(
        [
            (file, "factors on sigma, which evaluations and predictions of this checkpoint apply"),
            (file.with_suffix(".intervals.json"), "intervals of edges and curves of scores, which they add"),
        ]
    )


def _predict(given: argparse.Namespace, fields: Fields) -> None:
    workdir = _take_workdir(given, "predict")
    config = _read_config(given, workdir, fields)
    if given.output:
        config.predict.output = local_path(given.output, "--output")
    if not given.positional and not config.predict.input:
        raise UsageError(
            "no images are given; write klbox predict WORKDIR IMAGE ..., such as photos/ or photos/*.jpg"
        )
    _start("predict", f"reading {workdir}")
    from klbox_jax import modes

    job = modes.make_job(config, workdir)
    folder = modes.run_prediction(job, given.positional)
    _files(
        [
            (folder / "index.html", "the pictures with their boxes and bands of sigma"),
            (folder / "detections.json", "every object as a COCO data set, with bbox_std"),
        ]
    )


def _export(given: argparse.Namespace, fields: Fields) -> None:
    workdir = _take_workdir(given, "export")
    config = _read_config(given, workdir, fields)
    if given.output:
        config.export.output = local_path(given.output, "--output")
    _start("export", f"reading {workdir}")
    from klbox_jax import modes

    job = modes.make_job(config, workdir)
    (chosen,) = modes.settings_of(job.config).values()
    folder = modes.run_export(job, chosen)
    _files(
        [
            (
                folder / "load_detector.py",
                "loads the folder; needs jax, numpy and flatbuffers, not this package",
            ),
            (folder / "model.json", "classes, and the meaning of inputs and outputs"),
        ]
    )


def _report(given: argparse.Namespace, fields: Fields) -> None:
    _refuse_fields("report", fields)
    workdirs = [local_path(path, "WORKDIR") for path in given.workdir + given.positional]
    if not workdirs:
        raise UsageError("WORKDIR is missing; write klbox report WORKDIR, the folder of a run")
    if len(given.name) > 1 and len(workdirs) == 1:
        workdirs *= len(given.name)  # names of one run side by side
    output = pathlib.Path(local_path(given.output, "--output"))
    _say(f"klbox report: reading {' and '.join(dict.fromkeys(workdirs))}")
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # the data set library logs more than a user needs
    from klbox_jax.report.__main__ import write_report

    write_report(
        workdirs,
        output,
        num_images=given.images,
        steps=given.step,
        settings=given.name,
        data_root=given.data_root and local_path(given.data_root, "--data_root"),
    )
    _files([(output, f"{output.stat().st_size / 1e6:.1f} MB, for any browser")])


def _check(given: argparse.Namespace, fields: Fields) -> int:
    folders = [*given.positional, *([given.root] if given.root else [])]
    if len(folders) > 1:
        raise UsageError(f"klbox check takes one FOLDER, but {len(folders)} are given")
    if not folders and given.config is None:
        raise UsageError(
            "FOLDER is missing; write klbox check FOLDER, the folder of a data set, or --config=NAME"
        )
    config = None
    if given.config is not None:
        config = load_config(given.config)
        apply_overrides(config, fields)
        config = with_local_paths(config)
    else:
        _refuse_fields("check", fields)
    arguments = [f"--root={local_path(folders[0], 'FOLDER')}"] if folders else []
    for name, value in vars(given).items():
        if name in ("positional", "root", "config", "help") or value in (None, False):
            continue
        arguments.append(f"--{name}" if value is True else f"--{name}={value}")
    _start("check", f"reading {folders[0] if folders else given.config}")
    from klbox_jax.data import check

    status = check.main(arguments, config=config, program="klbox check")
    if given.output:
        _files([(given.output, "every fault, as JSON")])
    return status


def _configs(given: argparse.Namespace, fields: Fields) -> None:
    from klbox_jax.command.listing import list_families, list_fields

    if len(given.positional) > 1:
        raise UsageError(f"klbox configs takes one NAME, but {len(given.positional)} are given")
    if not given.positional:
        _refuse_fields("configs", fields)
        print(list_families())
        return
    config = load_config(given.positional[0])
    apply_overrides(config, fields)
    print(list_fields(config))


def _refuse_fields(mode: str, fields: Fields) -> None:
    if fields:
        raise UsageError(
            f"--config.{fields[0][0]}: klbox {mode} reads no field of a config here; leave it out"
        )


_COMMANDS = {
    "train": _train,
    "eval": _evaluate,
    "calibrate": _calibrate,
    "predict": _predict,
    "export": _export,
    "report": _report,
    "check": _check,
    "configs": _configs,
}
