"""Table 1 of He et al. 2019: what KL Loss, soft-NMS and variance voting each add.

    python -m experiments.table1 --preset=mini --workdir=runs/table1_mini

Two trainings of equal schedule, coder, normalizer and data order, one with smooth-L1 and one with KL Loss,
make six rows: each network's raw predictions are post-processed under every setting from one forward pass.
What is finished is skipped, what was interrupted goes on. The workdir then holds

    table.md, table.json      the six rows, the paper's numbers beside them
    ap_over_iou.png           AP of each row at each IoU threshold, and the gain over the baseline
    detections.jpg            detections of the full row, their edges drawn with their sigma bands
    smooth_l1/, kl/           the two runs: checkpoints, metrics, detections of every row
"""

import dataclasses
import importlib.util
import os
import pathlib
import platform
import time

import ml_collections
import numpy as np
from absl import app, flags

from klbox_jax.main import exit_with_one_line, parse_flags, run, set_up_logging
from klbox_jax.postprocess.detect import PostprocessSettings
from klbox_jax.report import tables
from klbox_jax.report.pictures import contact_sheet, draw_detections, save_picture
from klbox_jax.report.plots import plot_ap_over_iou
from klbox_jax.train.job import Job
from klbox_jax.train.loop import training_seconds
from klbox_jax.train.workdir import Workdir, read_json, write_atomically, write_json

# Detections below this score are not drawn.
DISPLAY_SCORE = 0.4

_PRESET = flags.DEFINE_enum(
    "preset",
    "mini",
    ["mini", "aquarium"],
    "mini: the embedded scenes; aquarium: MobileNetV2-FPN on a COCO folder (--data_root, --init_weights).",
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Where the runs and the table go; default runs/table1_PRESET.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters, the sampling and the data order.")
_NOISE_SCALE = flags.DEFINE_float(
    "noise_scale", 1.0, "Factor of the scenes' label noise; 0 and 2 are the controls."
)
_DATA_ROOT = flags.DEFINE_string("data_root", "", "COCO folder of the preset aquarium.")
_INIT_WEIGHTS = flags.DEFINE_string("init_weights", "", "ImageNet weights of the preset aquarium.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands of the two trainings and stop.")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: which network, and how its predictions become detections."""

    name: str
    loss: str
    suppression: str
    voting: str


ROWS = (
    Row("baseline", "smooth_l1", "hard", "none"),
    Row("soft_nms", "smooth_l1", "soft_gaussian", "none"),
    Row("kl", "kl", "hard", "none"),
    Row("kl_voting", "kl", "hard", "variance"),
    Row("kl_soft_nms", "kl", "soft_gaussian", "none"),
    Row("kl_voting_soft_nms", "kl", "soft_gaussian", "variance"),
)
LOSSES = ("smooth_l1", "kl")
PRESETS = {"mini": "configs/scenes.py", "aquarium": "configs/faster_rcnn_mobilenet_v2_fpn.py"}


def overrides(preset: str) -> dict[str, object]:
    """Returns the config fields that the flags set, beside the loss."""
    fields: dict[str, object] = {"seed": _SEED.value}
    if preset == "mini":
        fields["data.noise_scale"] = _NOISE_SCALE.value
    else:
        if not (_DATA_ROOT.value and _INIT_WEIGHTS.value):
            raise ValueError("--preset=aquarium needs --data_root=FOLDER and --init_weights=FILE.pth")
        fields |= {"data.root": _DATA_ROOT.value, "model.init_weights": _INIT_WEIGHTS.value}
    return fields


def load_config(path: str, loss: str, fields: dict[str, object]) -> ml_collections.ConfigDict:
    """Returns the config file's `get_config` for a loss, with fields replaced, locked."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(f"loss={loss}").lock()
    config.update_from_flattened_dict(fields)
    return config


def postprocess_settings(config, row: Row) -> PostprocessSettings:
    """Returns the config's post-processing under the row's two switches."""
    fields = config.postprocess.to_dict() | {"suppression": row.suppression, "voting": row.voting}
    return PostprocessSettings(**fields)


def evaluate_rows(config, workdir: pathlib.Path, step: int) -> dict[str, dict]:
    """Returns the metrics of the rows that share a loss; evaluates only where a result is missing."""
    rows = [row for row in ROWS if row.loss == config.model.box_loss]
    files = {row.name: workdir / "eval" / str(step) / row.name / "metrics.json" for row in rows}
    if not all(file.exists() for file in files.values()):
        run(
            config,
            str(workdir),
            "eval",
            settings={row.name: postprocess_settings(config, row) for row in rows},
        )
    return {name: read_json(file) for name, file in files.items()}


def train_and_evaluate(config, workdir: pathlib.Path) -> list[dict]:
    """Returns the table's rows of one loss, training and evaluating what is not yet done."""
    job = Job(config=config, workdir=Workdir(workdir))
    run(config, str(workdir), "train")
    metrics = evaluate_rows(config, workdir, job.total_steps)
    return [
        dataclasses.asdict(row)
        | metrics[row.name]
        | {"seed": config.seed, "steps": job.total_steps, "seconds": round(training_seconds(job), 1)}
        for row in ROWS
        if row.name in metrics
    ]


def draw_examples(
    config, workdir: pathlib.Path, rows: list[dict], path: pathlib.Path, *, count: int = 12
) -> None:
    """Draws the full row's detections on some images, with true boxes dashed and sigma bands on every edge."""
    source = Job(config=config, workdir=Workdir(workdir)).eval_source
    step = next(row["steps"] for row in rows if row["name"] == ROWS[-1].name)
    results = read_json(workdir / "eval" / str(step) / ROWS[-1].name / "detections.json")
    class_of = dict(zip(source.category_ids, source.class_names, strict=True))
    panels = []
    # Evenly spread over the set, so that the picture is not a selection.
    for index in np.linspace(0, len(source.records) - 1, count).astype(int):
        record = source.records[index]
        found = [r for r in results if r["image_id"] == record.image_id and r["score"] >= DISPLAY_SCORE]
        corners = np.array([r["bbox"] for r in found], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        panels.append(
            draw_detections(
                source.load_image(int(index)),
                corners,
                [class_of[r["category_id"]] for r in found],
                np.array([r["score"] for r in found], np.float64),
                np.array([r["bbox_std"] for r in found], np.float64).reshape(-1, 4),
                gt_boxes=record.boxes.astype(np.float64),
                class_names=source.class_names,
            )
        )
    save_picture(path, contact_sheet(panels, columns=4))


def write_table(rows: list[dict], workdir: pathlib.Path, *, meta: dict[str, object]) -> None:
    """Writes table.md, table.json and the plot of AP over IoU."""
    write_json(workdir / "table.json", {"rows": rows, **meta})
    write_atomically(workdir / "table.md", tables.table1_markdown(rows, meta=meta))
    plot_ap_over_iou(
        rows, workdir / "ap_over_iou.png", title=f"Table 1, {meta['data']}, seed {rows[0]['seed']}"
    )


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    started = time.perf_counter()
    preset = _PRESET.value
    workdir = pathlib.Path(_WORKDIR.value or f"runs/table1_{preset}")
    fields = overrides(preset)
    configs = {loss: load_config(PRESETS[preset], loss, fields) for loss in LOSSES}
    if _DRY_RUN.value:
        for loss in LOSSES:
            values = " ".join(f"--config.{name}={value}" for name, value in fields.items())
            print(
                f"python -m klbox_jax.main --config={PRESETS[preset]}:loss={loss} {values} "
                f"--workdir={workdir / loss} --mode=train_and_eval"
            )
        return
    rows = [row for loss in LOSSES for row in train_and_evaluate(configs[loss], workdir / loss)]
    source = Job(config=configs["kl"], workdir=Workdir(workdir / "kl")).eval_source
    meta = {
        "preset": preset,
        "data": source.name,
        "data_fingerprint": getattr(source, "fingerprint", None),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    write_table(rows, workdir, meta=meta)
    draw_examples(configs["kl"], workdir / "kl", rows, workdir / "detections.jpg")
    print((workdir / "table.md").read_text())
    print(f"{time.perf_counter() - started:.0f} seconds. Everything lies in {workdir}:")
    for name, what in (
        ("table.md", "the table"),
        ("table.json", "the same for programs"),
        ("ap_over_iou.png", "AP over IoU"),
        ("detections.jpg", "detections with sigma bands"),
        ("smooth_l1/, kl/", "checkpoints, metrics.jsonl, TensorBoard files, detections of every row"),
    ):
        print(f"  {name:18} {what}")


if __name__ == "__main__":
    set_up_logging()
    app.run(exit_with_one_line(main), flags_parser=parse_flags)
