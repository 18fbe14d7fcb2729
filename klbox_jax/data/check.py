"""Check of a data set: lists every fault by the rules of training, and prints the set's statistics.

    python -m klbox_jax.data.check --root=data/coco
    python -m klbox_jax.data.check --root=data/VOCdevkit --split=2007_trainval --output=check.json
    python -m klbox_jax.data.check --config=runs/kl/config.json
    klbox check data/coco

The readers, and so the rules, are those of a training with the same `config.data`. With `--config` its fields apply,
and every image is also checked against the canvases and `max_gt`. Without it, the layout of the folder is detected,
masks are checked with `--masks` only, and boxes of no width or height are left out with a warning, as in the configs
for COCO.

Every annotation is checked, and every image decoded, which takes about ten milliseconds each. The exit status is 0 if
there is no fault, 1 if there is any, and 2 if the command itself is wrong; notes do not count. A training stops at
faults of severity "fatal" or "error", or leaves out their images, and uses entries with a "warning" unchanged: with
`--allow_warnings` the exit status is 0 if there are only warnings.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

from klbox_jax.config.family import load_config
from klbox_jax.data.data_report import check_data, format_report, write_report
from klbox_jax.data.layout import find_coco_splits, find_layout
from klbox_jax.data.voc_files import find_voc_splits
from klbox_jax.data.yolo_config import find_yolo_config, read_yolo_config


def find_splits(root: str | os.PathLike, layout: str) -> list[str]:
    """Returns the splits of a folder in the layout auto, coco, voc or yolo; raises DataError for auto."""
    if layout == "coco":
        return list(find_coco_splits(root))
    if layout == "voc":
        return find_voc_splits(root)
    if layout == "yolo":
        path = find_yolo_config(root)
        return list(read_yolo_config(path).splits) if path else []
    return list(find_layout(root).splits)


def anchor_sizes_of(config: Any) -> tuple[float, ...]:
    """Returns the anchor sizes of a whole config, of all levels; empty if it names none."""
    sizes: Any = config
    for key in ("model", "rpn", "anchor_sizes"):
        sizes = sizes.get(key) if sizes is not None else None
    return tuple(float(size) for level in sizes or () for size in level)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Ends the program with one line, without the usage."""
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m klbox_jax.data.check",
        description="Lists every fault of a data set by the rules of training, and prints its statistics.",
    )
    parser.add_argument("--root", help="the data set's folder; that of the config by default")
    parser.add_argument("--config", default="", help="a config.json, or a config file: its rules apply")
    parser.add_argument(
        "--format", choices=("auto", "coco", "voc", "yolo"), help="its layout; auto by default"
    )
    parser.add_argument(
        "--split", default="", help="one split; all that the folder or the config has by default"
    )
    parser.add_argument("--class_names", default="", help="the classes of VOC's layout, with commas")
    parser.add_argument(
        "--first_pixel", type=int, choices=(0, 1), help="number of the first pixel in VOC's layout"
    )
    parser.add_argument("--masks", action="store_true", help="check masks too, as a training with masks does")
    parser.add_argument(
        "--refuse_empty_boxes", action="store_true", help="boxes of no width or height are errors"
    )
    parser.add_argument(
        "--allow_links", action="store_true", help="accept links out of the data set's folder"
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write all faults as JSON")
    parser.add_argument(
        "--allow_warnings", action="store_true", help="exit with 0 if there are only warnings"
    )
    parser.add_argument("--rows", type=int, default=100, help="print at most this many faults")
    parser.add_argument("--num_threads", type=int, default=os.cpu_count() or 1, help="threads that decode")
    return parser


def _data_config(arguments: argparse.Namespace, config: Any) -> Any:
    """Returns the `config.data` of the command line, based on that of a config if there is one."""
    defaults = {"name": "auto", "root": "", "skip_empty_boxes": True, "mask_size": 0, "class_names": ()}
    data = dict(config.data) if config is not None else defaults
    given = {
        "name": arguments.format or ("auto" if arguments.root and data["name"] == "scenes" else ""),
        "root": arguments.root,
        "class_names": tuple(filter(None, arguments.class_names.split(","))),
        "voc_first_pixel": arguments.first_pixel,
        "mask_size": data.get("mask_size", 0) or (28 if arguments.masks else 0),
        "allow_links": arguments.allow_links,
    }
    data |= {key: value for key, value in given.items() if value or (key == "voc_first_pixel" and value == 0)}
    if arguments.refuse_empty_boxes:
        data["skip_empty_boxes"] = False
    return ml_collections.ConfigDict(data)


def _splits(arguments: argparse.Namespace, data: Any, has_config: bool) -> list[str]:
    if arguments.split:
        return [arguments.split]
    if has_config:
        fields = ("train_split", "eval_split", "calibration_split")
        return list(dict.fromkeys(filter(None, (data.get(field, "") for field in fields))))
    return find_splits(data.root, data.name)


def main(argv: Sequence[str] | None = None, *, config: Any = None, program: str | None = None) -> int:
    """Checks the data set of the command line, prints the result, and returns the exit status.

    Args:
        argv: the arguments; those of the process by default.
        config: a whole config instead of that of `--config`.
        program: name of the program for messages.
    """
    parser = _parser()
    parser.prog = program or parser.prog
    arguments = parser.parse_args(argv)
    if arguments.num_threads < 1:
        parser.error("--num_threads must be positive")
    try:
        config = load_config(arguments.config) if arguments.config else config
        data = _data_config(arguments, config)
        if data.name != "scenes" and not os.path.isdir(data.root):
            parser.error(f"--root={data.root} is not a folder")
        splits = _splits(arguments, data, config is not None)
        if not splits:
            parser.error(
                f"{data.root} has no splits in the layout {data.name}; choose another --root or --format"
            )
        report = check_data(
            data,
            splits,
            num_threads=arguments.num_threads,
            anchor_sizes=anchor_sizes_of(config) if config is not None else (),
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    root = os.fspath(data.root)
    if report.faults or report.sound_images:
        print(format_report(report, root=root, rows=arguments.rows))
    if arguments.output:
        write_report(report, arguments.output, root=root, layout=data.name)
    return report.exit_status(allow_warnings=arguments.allow_warnings)


if __name__ == "__main__":
    sys.exit(main())
