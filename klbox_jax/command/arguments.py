"""Arguments of the command line, mode by mode, and its help. Imports no library."""

import argparse
import dataclasses
import textwrap
from typing import Any

from klbox_jax.config.family import closest, explanations, load_base

WIDTH = 110


@dataclasses.dataclass(frozen=True)
class Mode:
    """One mode of the command line.

    Attributes:
        usage: the positional arguments, as the help shows them.
        summary: one line.
        description: further lines of the help.
        groups: the groups of config fields that the mode reads.
    """

    usage: str
    summary: str
    description: str = ""
    groups: tuple[str, ...] = ()


_ALL = ("seed", "data", "model", "optimizer", "train", "evaluation", "postprocess", "calibrate")
_RUN = "The config is that of the run (config.json in its folder); --config.x=y changes a field."
MODES = {
    "train": Mode(
        "WORKDIR [--config=NAME]",
        "trains a detector, calibrates its sigma and evaluates it; the same command continues",
        "A first training needs --config; later the config is that of the folder. Data of your own "
        "(--config.data.root=FOLDER) keep a tenth of the training images out, to calibrate sigma on.",
        _ALL,
    ),
    "eval": Mode(
        "WORKDIR [--name=NAME]",
        "evaluates a run: AP, calibration of sigma and more",
        f"{_RUN} An evaluation with other settings or other data needs a --name.",
        ("data", "evaluation", "postprocess"),
    ),
    "calibrate": Mode(
        "WORKDIR [--data=FOLDER]",
        "fits the size of sigma on images that are neither trained on nor reported",
        f"{_RUN} Without --data the images are those that the training kept out.",
        ("calibrate", "data", "evaluation", "postprocess"),
    ),
    "predict": Mode(
        "WORKDIR IMAGE ...",
        "finds objects in photographs: images, folders or globs",
        _RUN,
        ("predict", "postprocess"),
    ),
    "export": Mode(
        "WORKDIR", "writes a detector that runs without this package", _RUN, ("export", "postprocess")
    ),
    "report": Mode("WORKDIR [WORKDIR]", "writes one HTML file about a run, or about two to compare"),
    "check": Mode(
        "FOLDER",
        "lists every fault of a data set by the rules of training, and its statistics",
        "",
        ("data",),
    ),
    "configs": Mode("[NAME[:ARGUMENT]]", "lists the configs, or the fields of one with their explanation"),
}
_OVERRIDES = "--config.FIELD=VALUE"


def parser_of(mode: str) -> argparse.ArgumentParser:
    """Returns the parser of a mode; fields of the config are taken out before it sees the arguments."""
    parser = _Parser(prog=f"klbox {mode}", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    if mode in ("train", "eval", "calibrate", "predict", "export"):
        more = "; then images, folders with their sub-folders, or globs" if mode == "predict" else ""
        add("positional", nargs="*", metavar="WORKDIR", help=f"folder of the run{more}")
        add("--workdir", metavar="WORKDIR", help="another spelling of WORKDIR")
        add(
            "--config",
            metavar="NAME",
            help="a config: NAME:ARGUMENT, FILE.py:ARGUMENT, or a run's config.json",
        )
    _ADD[mode](add)
    if mode in ("train", "eval"):
        add(
            "--coordinator_address",
            metavar="HOST:PORT",
            help="process 0, if several processes train together",
        )
        add("--num_processes", type=int, metavar="N", help="number of processes that train together")
        add("--process_id", type=int, metavar="RANK", help="rank of this process, from 0")
    add("-h", "--help", action="store_true", help="show this text")
    return parser


def parser_of_modes(modes: tuple[str, ...]) -> argparse.ArgumentParser:
    """Returns the parser of `python -m klbox_jax.main --mode=MODE`."""
    parser = _Parser(prog="python -m klbox_jax.main", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="NAME", help="a config: NAME:ARGUMENT, FILE.py:ARGUMENT, or a run's config.json")
    add("--workdir", metavar="WORKDIR", help="folder of the run; the same folder continues")
    add("--mode", choices=modes, default="train_and_eval", help="what to do; train_and_eval by default")
    add("--allow_config_change", action=_Switch, help="go on in a folder of another config")
    add("--coordinator_address", metavar="HOST:PORT", help="process 0, if several processes train together")
    add("--num_processes", type=int, metavar="N", help="number of processes that train together")
    add("--process_id", type=int, metavar="RANK", help="rank of this process, from 0")
    add("-h", "--help", action="store_true", help="show this text")
    return parser


def _add_train(add: Any) -> None:
    add("--no_eval", action="store_true", help="do not evaluate")
    add("--no_calibrate", action="store_true", help="do not calibrate sigma at the end")
    add("--allow_config_change", action=_Switch, help="go on in a folder of another config")


def _add_data(add: Any) -> None:
    add("--data", metavar="FOLDER", help="another labelled folder; its layout is detected")
    add("--split", metavar="SPLIT", help="split of the data set")


def _add_eval(add: Any) -> None:
    add("--name", default="", metavar="NAME", help="name of the evaluation: of its folder and its log tags")
    _add_data(add)


def _add_output(add: Any) -> None:
    add("--output", metavar="FOLDER", help="folder of the results")


def _add_report(add: Any) -> None:
    add("positional", nargs="*", metavar="WORKDIR", help="folder of a run; two to compare")
    add("--workdir", action="append", default=[], metavar="WORKDIR", help="another spelling of WORKDIR")
    add("--output", default="report.html", metavar="FILE", help="file to write; report.html by default")
    add(
        "--name", action="append", default=[], metavar="NAME", help="a named evaluation; several side by side"
    )
    add("--step", action="append", type=int, default=[], metavar="STEP", help="an evaluated step")
    add("--images", type=int, default=500, metavar="N", help="largest number of images; 500 by default")
    add("--data_root", metavar="FOLDER", help="folder of the data set, if it is not the config's")


def _add_check(add: Any) -> None:
    add(
        "positional",
        nargs="*",
        metavar="FOLDER",
        help="folder of the data set; that of the config by default",
    )
    add("--root", metavar="FOLDER", help="another spelling of FOLDER")
    add("--config", metavar="NAME", help="a config or a run's config.json: its rules and splits apply")
    add("--format", choices=("auto", "coco", "voc", "yolo"), help="layout of the folder; auto by default")
    add("--split", metavar="SPLIT", help="one split; all by default")
    add("--class_names", metavar="A,B", help="classes of VOC's layout")
    add("--first_pixel", choices=("0", "1"), help="number of the first pixel in VOC's layout")
    add("--masks", action="store_true", help="check masks too, as a training with masks does")
    add("--refuse_empty_boxes", action="store_true", help="boxes of no width or height are errors")
    add("--allow_links", action="store_true", help="accept links out of the folder")
    add("--output", metavar="FILE", help="also write all faults as JSON")
    add("--allow_warnings", action="store_true", help="exit with 0 if there are only warnings")
    add("--rows", type=int, metavar="N", help="print at most this many faults; 100 by default")
    add("--num_threads", type=int, metavar="N", help="threads that decode images")


def _add_configs(add: Any) -> None:
    add(
        "positional",
        nargs="*",
        metavar="NAME",
        help="a family with its argument, a file, or a run's config.json",
    )


_ADD = {
    "train": _add_train,
    "eval": _add_eval,
    "calibrate": _add_data,
    "predict": _add_output,
    "export": _add_output,
    "report": _add_report,
    "check": _add_check,
    "configs": _add_configs,
}


class UsageError(ValueError):
    """The command line is wrong; the message names the argument and what is allowed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            argument = message.removeprefix("unrecognized arguments: ").split()[0]
            known = [name for action in self._actions for name in action.option_strings]
            likely = closest(argument.partition("=")[0], known, count=1)
            message = f"{argument}: there is no such argument" + (
                f"; the closest is {likely[0]}" if likely else ""
            )
        raise UsageError(f"{message[0].lower()}{message[1:]} (see {self.prog} --help)")


class _Switch(argparse.BooleanOptionalAction):
    """`--allow_config_change`, `--noallow_config_change`, and `--allow_config_change=true` as absl has them."""

    def __init__(self, option_strings, dest, default=False, help=None):
        argparse.Action.__init__(
            self,
            [*option_strings, *("--no" + s[2:] for s in option_strings)],
            dest,
            nargs="?",
            default=default,
        )
        self.help = help

    def __call__(self, parser, namespace, values, option_string=None):
        text = "true" if values is None else values.lower()
        if text not in ("true", "false", "1", "0"):
            parser.error(f"argument {option_string}: write true or false, not {values!r}")
        given = text in ("true", "1")
        setattr(namespace, self.dest, given != option_string.startswith("--no"))


def with_underscores(arguments: list[str]) -> list[str]:
    """Returns arguments whose flags have underscores for dashes: `--no-eval` is `--no_eval`."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_flag = name.startswith("--") and not name.startswith(("--config.", "--noconfig."))
        found.append(("--" + name[2:].replace("-", "_") if is_flag else name) + equals + value)
    return found


def help_of_all() -> str:
    """Returns the help of `klbox --help`."""
    lines = [
        "klbox: object detectors that predict how uncertain every box edge is",
        "",
        "usage: klbox MODE ...; klbox MODE --help lists what each mode takes",
        "",
    ]
    lines += [f"  klbox {name:10} {mode.usage:30} {mode.summary}" for name, mode in MODES.items()]
    lines += [
        "",
        "for a start:",
        "  klbox train runs/first --config=faster_rcnn_mobilenet_v2_fpn --config.data.root=my_data",
        "  klbox predict runs/first photos/",
        "",
        f"{_OVERRIDES} sets any field of the config. Its fields, in groups (klbox configs NAME shows the values of "
        "one config):",
        "",
        *_field_lines(tuple(load_base().BASE)),
        "",
        "KLBOX_TRACEBACK=1 in the environment shows where an error was raised.",
    ]
    return "\n".join(lines)


def help_of(mode: str) -> str:
    """Returns the help of `klbox MODE --help`."""
    about = MODES[mode]
    lines = [f"usage: klbox {mode} {about.usage}", "", f"klbox {mode} {about.summary}."]
    if about.description:
        lines += textwrap.wrap(about.description, WIDTH)
    lines += ["", *_argument_lines(parser_of(mode))]
    if about.groups:
        lines += ["", f"{_OVERRIDES} sets a field of the config; fields that this mode reads:", ""]
        lines += _field_lines(about.groups)
    return "\n".join(lines)


def help_of_modes(parser: argparse.ArgumentParser) -> str:
    """Returns the help of `python -m klbox_jax.main --help`."""
    return "\n".join(
        [
            f"usage: {parser.prog} --config=NAME --workdir=WORKDIR --mode=MODE (or klbox MODE; see klbox --help)",
            "",
            *_argument_lines(parser),
            "",
            f"{_OVERRIDES} sets a field of the config:",
            "",
            *_field_lines(tuple(load_base().BASE)),
        ]
    )


def _argument_lines(parser: argparse.ArgumentParser) -> list[str]:
    lines = []
    for action in parser._actions:
        value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
        takes = action.option_strings and action.nargs not in (0, "?")
        name = action.option_strings[-1] + (f"={value}" if takes else "") if action.option_strings else value
        lines.append(f"  {name:36} {action.help}")
    return lines


def _field_lines(groups: tuple[str, ...]) -> list[str]:
    """Returns a line for each field of the groups: its name, its default, and its explanation."""
    texts = explanations()
    fields = dict(_flatten({group: load_base().BASE[group] for group in groups}, ""))
    for name in load_base().EXTRA_FIELDS:
        if name.partition(".")[0] in groups:
            fields.setdefault(name, None)
    order = sorted(fields, key=lambda name: groups.index(name.partition(".")[0]))
    return [
        line
        for name in order
        for line in _field_line(f"  --config.{name}", fields[name], texts.get(name, ""))
    ]


def _field_line(name: str, value: Any, text: str) -> list[str]:
    shown = "" if value is None else f" [{value if value != '' else repr(value)}]"
    return textwrap.wrap(
        f"{name:52} {text}{shown}", WIDTH + 40, subsequent_indent=" " * 53, break_on_hyphens=False
    )


def _flatten(value: Any, prefix: str):
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner
