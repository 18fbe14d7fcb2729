"""Table 1 of He et al. 2019: what KL Loss, soft-NMS and variance voting each add.

    python -m experiments.table1 --preset=mini --workdir=runs/table1_mini
    python -m experiments.table1 --preset=mini --seeds=5 --workdir=runs/table1_mini_seeds
    python -m experiments.table1 --preset=blood_cells --seeds=5 --data_root=COCO_FOLDER --init_weights=MOBILENET_V2.pth
    python -m experiments.table1 --preset=full --data_root=COCO_FOLDER --init_weights=VGG16.pth

Two trainings of equal schedule, coder, normalizer and data order, one with smooth-L1 and one with KL Loss,
make six rows: each network's raw predictions are post-processed under every setting from one forward pass.
What is finished is skipped, what was interrupted goes on. The workdir then holds

    table.md, table.json      the six rows, the paper's numbers beside them
    ap_over_iou.png           AP of each row at each IoU threshold, and the gain over the baseline
    detections.jpg            detections of the full row, their edges drawn with their sigma bands
    smooth_l1/, kl/           the two runs: checkpoints, metrics, detections of every row

With several seeds each has such a folder, `seed0/`, `seed1/`, ..., and above them stand

    table.md, table.json      means, and paired differences with their intervals (`experiments/seeds.py`)
    ap_over_iou.png           the means

written anew whenever a seed is finished.
"""

import pathlib
import time
from collections.abc import Mapping

from absl import app, flags

from experiments import runs, seeds
from experiments.rows import BASELINE, KL, KL_SOFT_NMS, KL_VOTING, KL_VOTING_SOFT_NMS, SOFT_NMS, Row
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.data.source import Source
from klbox_jax.evaluation.bootstrap import match_classes
from klbox_jax.files import read_json, write_atomically, write_json
from klbox_jax.report import tables
from klbox_jax.report.pictures import contact_sheet, save_picture
from klbox_jax.report.plots import plot_ap_over_iou
from klbox_jax.train.job import Job
from klbox_jax.train.sample_pictures import draw_samples
from klbox_jax.train.workdir import Workdir

_NOISE_SCALE = flags.DEFINE_float(
    "noise_scale", 1.0, "Factor of the scenes' label noise; 0 and 2 are the controls."
)

ROWS = (BASELINE, SOFT_NMS, KL, KL_VOTING, KL_SOFT_NMS, KL_VOTING_SOFT_NMS)
LOSSES = ("smooth_l1", "kl")
# What the seeds are asked: each row over the baseline, and what voting adds to KL Loss.
PAIRS = (
    *((row.name, ROWS[0].name) for row in ROWS[1:]),
    ("kl_voting", "kl"),
    ("kl_voting_soft_nms", "kl_soft_nms"),
)


def overrides(seed: int) -> dict[str, object]:
    """Returns the config fields that the seed and the flags set, beside the loss."""
    fields = {"seed": seed, **runs.preset_fields(), **runs.schedule_fields()}
    if runs.PRESET.value == "mini":
        fields["data.noise_scale"] = _NOISE_SCALE.value
    return fields


def rows_of(loss: str) -> tuple[Row, ...]:
    """Returns the rows that share the network trained with a loss."""
    return tuple(row for row in ROWS if row.loss == loss)


def draw_examples(
    config, workdir: pathlib.Path, rows: list[dict], path: pathlib.Path, *, count: int = 12
) -> None:
    """Draws the full row's detections on some images, with true boxes dashed and sigma bands on every edge."""
    source = Job(config=config, workdir=Workdir(workdir)).eval_source
    step = next(row["steps"] for row in rows if row["name"] == ROWS[-1].name)
    results = read_json(workdir / "eval" / str(step) / ROWS[-1].name / "detections.json")
    pictures = draw_samples(source, results, count=count)
    save_picture(path, contact_sheet(list(pictures.values()), columns=4))


def write_table(rows: list[dict], workdir: pathlib.Path, *, meta: dict[str, object]) -> None:
    """Writes table.md, table.json and the plot of AP over IoU."""
    write_json(workdir / "table.json", {"rows": rows, **meta})
    text = tables.table1_markdown(rows, meta=meta, comparable=meta["preset"] == "full")
    write_atomically(workdir / "table.md", text)
    plot_ap_over_iou(
        rows, workdir / "ap_over_iou.png", title=f"Table 1, {meta['data']}, seed {rows[0]['seed']}"
    )


def run_seed(seed: int, workdir: pathlib.Path) -> list[dict]:
    """Returns the six rows of one seed, doing what is not yet done, and writes its table and pictures."""
    path, fields = runs.CONFIGS[runs.PRESET.value], overrides(seed)
    configs = {loss: runs.load_config(path, f"loss={loss}", fields) for loss in LOSSES}
    rows = [
        row
        for loss in LOSSES
        for row in runs.train_and_evaluate(configs[loss], workdir / loss, rows_of(loss))
    ]
    source = Job(config=configs["kl"], workdir=Workdir(workdir / "kl")).eval_source
    write_table(rows, workdir, meta=meta_of(source))
    draw_examples(configs["kl"], workdir / "kl", rows, workdir / "detections.jpg")
    return rows


def meta_of(source: Source) -> dict[str, object]:
    """Returns what all rows share."""
    return {
        "preset": runs.PRESET.value,
        "data": source.name,
        "data_fingerprint": source.fingerprint,
        "machine": runs.machine(),
    }


def write_seeds(rows_by_seed: list[list[dict]], workdir: pathlib.Path) -> None:
    """Writes what the seeds that are finished say together."""
    config = runs.load_config(runs.CONFIGS[runs.PRESET.value], "loss=kl", overrides(runs.SEED.value))
    source = Job(config=config, workdir=Workdir(workdir)).eval_source
    truth = source.coco_ground_truth()
    matched = {}
    for row in (row for rows in rows_by_seed for row in rows):
        matched[row["seed"], row["name"]] = match_classes(truth, read_detections(row, workdir))
    means = seeds.mean_rows(rows_by_seed)
    found = seeds.differences(rows_by_seed, seeds.resampled_metrics(matched), PAIRS)
    meta = meta_of(source)
    write_json(
        workdir / "table.json", {"rows": means, "differences": [one.to_dict() for one in found], **meta}
    )
    write_atomically(workdir / "table.md", seeds.markdown(means, found, meta=meta))
    title = f"Table 1, {source.name}, mean of {len(rows_by_seed)} seeds"
    plot_ap_over_iou(means, workdir / "ap_over_iou.png", title=title)


def seed_folder(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Returns the folder of one of several seeds."""
    return workdir / f"seed{seed}"


def read_detections(row: Mapping, workdir: pathlib.Path) -> list[dict]:
    """Returns the detections of a row of one of several seeds."""
    network = seed_folder(workdir, row["seed"]) / row["loss"]
    return read_json(network / "eval" / str(row["steps"]) / row["name"] / "detections.json")


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    started = time.perf_counter()
    chosen = range(runs.SEED.value, runs.SEED.value + runs.SEEDS.value)
    workdir = runs.workdir("table1") if len(chosen) == 1 else runs.workdir("table1", "seeds")
    folders = {seed: workdir if len(chosen) == 1 else seed_folder(workdir, seed) for seed in chosen}
    if runs.DRY_RUN.value:
        for seed, folder in folders.items():
            for loss in LOSSES:
                path = runs.CONFIGS[runs.PRESET.value]
                print(runs.command(path, f"loss={loss}", overrides(seed), folder / loss))
        return
    finished = []
    for seed, folder in folders.items():
        finished.append(run_seed(seed, folder))
        if len(folders) > 1:
            write_seeds(finished, workdir)
    print((workdir / "table.md").read_text())
    print(f"{time.perf_counter() - started:.0f} seconds. Everything lies in {workdir}:")
    files = [
        ("table.md", "the table"),
        ("table.json", "the same for programs"),
        ("ap_over_iou.png", "AP over IoU"),
    ]
    files += (
        [
            ("detections.jpg", "detections with sigma bands"),
            ("smooth_l1/, kl/", "checkpoints, metrics.jsonl, TensorBoard files, detections of every row"),
        ]
        if len(folders) == 1
        else [("/, ".join(folder.name for folder in folders.values()) + "/", "the same of each seed")]
    )
    for name, what in files:
        print(f"  {name:18} {what}")


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
