"""Trains variants of a config file once and evaluates them under many post-processings; flags of all experiments."""

import dataclasses
import importlib.util
import os
import pathlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from klbox_jax.data.source import Source
from klbox_jax.files import read_json, write_atomically, write_json
from klbox_jax.main import run
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.report.tables import LABELS
from klbox_jax.train.job import Job
from klbox_jax.train.loop import training_seconds
from klbox_jax.train.workdir import Workdir

# Defined here alone: tests import several experiments into one process, and a flag may be defined once.
PRESET = flags.DEFINE_enum(
    "preset",
    "mini",
    ["mini", "aquarium", "blood_cells", "full"],
    "mini: the embedded scenes; aquarium, blood_cells: MobileNetV2-FPN on a COCO folder; full: the paper's setting. "
    "The last three need --data_root and --init_weights.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the runs and of the table; default runs/EXPERIMENT_PRESET."
)
DATA_ROOT = flags.DEFINE_string("data_root", "", "Folder of the data set; all presets but mini need it.")
INIT_WEIGHTS = flags.DEFINE_string("init_weights", "", "ImageNet weights; all presets but mini need them.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands of the trainings and stop.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the parameters, the sampling and the data order; the first of --seeds."
)
SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds, from --seed on; of table1 and methods.")
NUM_EPOCHS = flags.DEFINE_float("num_epochs", 0.0, "Length of each training; 0 for the preset's own.")

SCENES_CONFIG = "configs/scenes.py"
PHOTOGRAPHS_CONFIG = "configs/faster_rcnn_mobilenet_v2_fpn.py"
# Config files of Table 1; the paper's is VGG-16 on COCO.
CONFIGS = {
    "mini": SCENES_CONFIG,
    "aquarium": PHOTOGRAPHS_CONFIG,
    "blood_cells": PHOTOGRAPHS_CONFIG,
    "full": "configs/faster_rcnn_vgg16.py",
}
# Fields in which a preset differs from its config file. Those of the blood cells are fixed by docs/protocol.md.
PRESET_FIELDS = {
    # Three quarters of Aquarium's 912 steps.
    "aquarium": {"data.name": "coco", "model.box_loss_settings.ramp_steps": 684},
    "blood_cells": {
        "data.name": "coco",
        "train.num_epochs": 6.0,
        "model.box_loss_settings.ramp_steps": 450,
    },
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a network, and the post-processing of its predictions."""

    name: str  # unique in its table; the folder of its results
    loss: str  # `config.model.box_loss` of the network
    suppression: str  # suppression and voting: fields of `PostprocessSettings`
    voting: str
    # further fields of `PostprocessSettings`.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def labels(self) -> dict[str, str]:
        """Returns the columns that identify the row."""
        return {label: getattr(self, label) for label in LABELS}


# Results are in the folder of their network by the name of the row, and tables share them: a name has one meaning.
BASELINE = Row("baseline", "smooth_l1", "hard", "none")
BOX_VOTING = Row("box_voting", "smooth_l1", "hard", "box_voting")
SOFT_NMS = Row("soft_nms", "smooth_l1", "soft_gaussian", "none")
IOU_NET = Row("iou_net", "iou_net", "iou_guided", "none", {"refine_steps": 5})
KL = Row("kl", "kl", "hard", "none")
KL_VOTING = Row("kl_voting", "kl", "hard", "variance")
KL_SOFT_NMS = Row("kl_soft_nms", "kl", "soft_gaussian", "none")
KL_VOTING_SOFT_NMS = Row("kl_voting_soft_nms", "kl", "soft_gaussian", "variance")


def load_config(path: str, arg: str, fields: Mapping[str, object]) -> ml_collections.ConfigDict:
    """Returns the config file's `get_config(arg)` with fields replaced, locked."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg).lock()
    config.update_from_flattened_dict(dict(fields))
    return config


def preset_config(arg: str, fields: Mapping[str, object]) -> ml_collections.ConfigDict:
    """Returns the config of the preset that the flags name; see `load_config`."""
    return load_config(CONFIGS[PRESET.value], arg, fields)


def check_preset(experiment: str, *known: str) -> str:
    """Returns the preset that the flags name; raises ValueError where the experiment does not have it."""
    if PRESET.value not in known:
        raise ValueError(f"{experiment} has no preset {PRESET.value}; choose {' or '.join(known)}")
    return PRESET.value


def preset_fields() -> dict[str, object]:
    """Returns the config fields that the preset sets; a dry run may leave the files of the last three open.

    Raises ValueError if a flag that the preset needs is missing.
    """
    if PRESET.value == "mini":
        return {}
    root, weights = DATA_ROOT.value, INIT_WEIGHTS.value
    if DRY_RUN.value:
        root, weights = root or "DATA_ROOT", weights or "INIT_WEIGHTS"
    if not (root and weights):
        raise ValueError(f"--preset={PRESET.value} needs --data_root=FOLDER and --init_weights=FILE.pth")
    return {"data.root": root, "model.init_weights": weights, **PRESET_FIELDS.get(PRESET.value, {})}


def schedule_fields() -> dict[str, object]:
    """Returns the config fields that `--num_epochs` sets."""
    return {"train.num_epochs": NUM_EPOCHS.value, "train.num_steps": 0} if NUM_EPOCHS.value else {}


def workdir(experiment: str, suffix: str = "") -> pathlib.Path:
    """Returns the folder that the flags name, or one named after the experiment."""
    return pathlib.Path(WORKDIR.value or "runs/" + "_".join(filter(None, (experiment, PRESET.value, suffix))))


def command(path: str, arg: str, fields: Mapping[str, object], workdir: pathlib.Path) -> str:
    """Returns the command line that trains and evaluates a config, for a dry run."""
    values = "".join(f" --config.{name}={shlex.quote(str(value))}" for name, value in fields.items())
    return f"python -m klbox_jax.main --config={path}:{arg}{values} --workdir={workdir} --mode=train_and_eval"


def job_of(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Job:
    """Returns the parts of a run: its model, data sets, folder and number of steps."""
    return Job(config=config, workdir=Workdir(workdir))


def postprocess_settings(config: ml_collections.ConfigDict, row: Row) -> PostprocessSettings:
    """Returns the post-processing of the config with the fields of the row."""
    fields = {"suppression": row.suppression, "voting": row.voting, **row.settings}
    return PostprocessSettings(**(config.postprocess.to_dict() | fields))


def evaluate_rows(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, step: int, rows: Sequence[Row]
) -> dict[str, dict]:
    """Returns the metrics of rows of one network by name; evaluates only those whose result is missing."""
    files = {row.name: workdir / "eval" / str(step) / row.name / "metrics.json" for row in rows}
    missing = {row.name: postprocess_settings(config, row) for row in rows if not files[row.name].exists()}
    if missing:
        run(config, str(workdir), "eval", settings=missing)
    return {name: read_json(file) for name, file in files.items()}


def read_detections(workdir: pathlib.Path, step: int, name: str) -> list[dict]:
    """Returns the detections of a row of the network in a workdir."""
    return read_json(workdir / "eval" / str(step) / name / "detections.json")


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, rows: Sequence[Row]
) -> list[dict]:
    """Returns the table's entries for rows of one network; trains and evaluates only what is missing."""
    job = job_of(config, workdir)
    run(config, str(workdir), "train")
    metrics = evaluate_rows(config, workdir, job.total_steps, rows)
    seconds = round(training_seconds(job), 1)
    provenance = {"seed": config.seed, "steps": job.total_steps, "seconds": seconds}
    return [row.labels() | metrics[row.name] | provenance for row in rows]


def machine() -> str:
    """Returns the processor's kind and the number of its cores."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def meta_of(entry: Mapping) -> dict[str, object]:
    """Returns the facts that all rows of a table share, from one of its entries: preset, data and machine."""
    data = {key: entry[key] for key in ("data", "data_fingerprint")}
    return {"preset": PRESET.value, **data, "machine": machine()}


def meta_of_source(source: Source) -> dict[str, object]:
    """Returns the facts that all rows evaluated on a data set share."""
    return meta_of({"data": source.name, "data_fingerprint": source.fingerprint})


def write_result(
    folder: pathlib.Path, result: Mapping[str, object], text: str, *, name: str = "table"
) -> None:
    """Writes a result as NAME.json, for programs, and as NAME.md, for readers."""
    write_json(folder / f"{name}.json", result)
    write_atomically(folder / f"{name}.md", text)
