"""Table 1 of He et al. 2019: the gains of KL Loss, soft-NMS and variance voting.

    python -m experiments.table1 --preset=mini --workdir=runs/table1_mini
    python -m experiments.table1 --preset=mini --seeds=5 --workdir=runs/table1_mini_seeds
    python -m experiments.table1 --preset=blood_cells --seeds=5 --data_root=COCO_FOLDER --init_weights=MOBILENET_V2.pth
    python -m experiments.table1 --preset=full --data_root=COCO_FOLDER --init_weights=VGG16.pth

Two trainings of equal schedule, coder, normalizer and data order, one with smooth-L1 and one with KL Loss, make six
rows: each network's raw predictions are post-processed under every setting from one forward pass. Finished work is
skipped, interrupted work is resumed. The workdir then holds

    table.md, table.json      the six rows, with the paper's numbers
    ap_over_iou.png           AP of each row at each IoU threshold, and the gain over the baseline
    detections.jpg            detections of the full row, with the sigma bands of their edges
    smooth_l1/, kl/           the two runs: checkpoints, metrics, detections of every row

With several seeds there is such a folder for each, `seed0/`, `seed1/`, ..., and the workdir itself holds

    table.md, table.json      means, and paired differences with their intervals (`experiments/seeds.py`)
    ap_over_iou.png           the means

which are written again whenever a seed is finished.
"""

import pathlib
import time
from collections.abc import Mapping

from absl import flags

from experiments import runs, seeds
from experiments.runs import BASELINE, KL, KL_SOFT_NMS, KL_VOTING, KL_VOTING_SOFT_NMS, SOFT_NMS, Row
from klbox_jax import cli
from klbox_jax.evaluation.bootstrap import match_classes
from klbox_jax.report import tables
from klbox_jax.report.pictures import contact_sheet, save_picture
from klbox_jax.report.plots import plot_ap_over_iou
from klbox_jax.train.sample_pictures import draw_samples

_NOISE_SCALE = flags.DEFINE_float(
    "noise_scale", 1.0, "Factor of the scenes' label noise; 0 and 2 are the controls."
)

ROWS = (BASELINE, SOFT_NMS, KL, KL_VOTING, KL_SOFT_NMS, KL_VOTING_SOFT_NMS)
LOSSES = ("smooth_l1", "kl")
# Differences over seeds: each row over the baseline, and voting over KL Loss.
PAIRS = (
    *((row.name, ROWS[0].name) for row in ROWS[1:]),
    ("kl_voting", "kl"),
    ("kl_voting_soft_nms", "kl_soft_nms"),
)
NUM_PICTURES = 12


def overrides(seed: int) -> dict[str, object]:
    """Returns the config fields that the seed and the flags set; the loss is not one of them."""
    fields = {"seed": seed, **runs.preset_fields(), **runs.schedule_fields()}
    if runs.PRESET.value == "mini":
        fields["data.noise_scale"] = _NOISE_SCALE.value
    return fields


def rows_of(loss: str) -> tuple[Row, ...]:
    """Returns the rows that share the network trained with a loss."""
    return tuple(row for row in ROWS if row.loss == loss)


def run_seed(seed: int, workdir: pathlib.Path) -> list[dict]:
    """Returns the six rows of one seed; does what is missing, and writes the seed's table and pictures."""
    configs = {loss: runs.preset_config(f"loss={loss}", overrides(seed)) for loss in LOSSES}
    rows = [
        row
        for loss in LOSSES
        for row in runs.train_and_evaluate(configs[loss], workdir / loss, rows_of(loss))
    ]
    source = runs.job_of(configs["kl"], workdir / "kl").eval_source
    meta = runs.meta_of_source(source)
    text = tables.table1_markdown(rows, meta=meta, comparable=meta["preset"] == "full")
    runs.write_result(workdir, {"rows": rows, **meta}, text)
    plot_ap_over_iou(rows, workdir / "ap_over_iou.png", title=f"Table 1, {source.name}, seed {seed}")
    detections = runs.read_detections(workdir / "kl", rows[-1]["steps"], ROWS[-1].name)
    pictures = draw_samples(source, detections, count=NUM_PICTURES)
    save_picture(workdir / "detections.jpg", contact_sheet(list(pictures.values()), columns=4))
    return rows


def write_seeds(rows_by_seed: list[list[dict]], workdir: pathlib.Path) -> None:
    """Writes the means of the finished seeds and their differences."""
    config = runs.preset_config("loss=kl", overrides(runs.SEED.value))
    source = runs.job_of(config, workdir).eval_source
    truth = source.coco_ground_truth()
    matched = {
        (row["seed"], row["name"]): match_classes(truth, read_detections(row, workdir))
        for rows in rows_by_seed
        for row in rows
    }
    compared = seeds.compare(rows_by_seed, matched, PAIRS)
    title = f"Table 1, {source.name}, mean of {len(rows_by_seed)} seeds"
    meta = runs.meta_of_source(source)
    seeds.write(compared, workdir, seeds.markdown(compared, meta=meta), meta=meta, title=title)


def seed_folder(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Returns the folder of one of several seeds."""
    return workdir / f"seed{seed}"


def read_detections(row: Mapping, workdir: pathlib.Path) -> list[dict]:
    """Returns the detections of a row of one of several seeds."""
    network = seed_folder(workdir, row["seed"]) / row["loss"]
    return runs.read_detections(network, row["steps"], row["name"])


def main(_: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
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
    print(f"{time.perf_counter() - started:.0f} seconds. Everything is in {workdir}.")


if __name__ == "__main__":
    cli.start(main)
