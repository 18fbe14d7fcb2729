"""Table 1 of He et al. 2019: what KL Loss, soft-NMS and variance voting each add.

    python -m experiments.table1 --preset=mini --workdir=runs/table1_mini
    python -m experiments.table1 --preset=full --data_root=COCO_FOLDER --init_weights=VGG16.pth

Two trainings of equal schedule, coder, normalizer and data order, one with smooth-L1 and one with KL Loss,
make six rows: each network's raw predictions are post-processed under every setting from one forward pass.
What is finished is skipped, what was interrupted goes on. The workdir then holds

    table.md, table.json      the six rows, the paper's numbers beside them
    ap_over_iou.png           AP of each row at each IoU threshold, and the gain over the baseline
    detections.jpg            detections of the full row, their edges drawn with their sigma bands
    smooth_l1/, kl/           the two runs: checkpoints, metrics, detections of every row
"""

import pathlib
import time

import numpy as np
from absl import app, flags

from experiments import runs
from experiments.runs import Row
from klbox_jax.main import exit_with_one_line, parse_flags, set_up_logging
from klbox_jax.report import tables
from klbox_jax.report.pictures import contact_sheet, draw_detections, save_picture
from klbox_jax.report.plots import plot_ap_over_iou
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir, read_json, write_atomically, write_json

# Detections below this score are not drawn.
DISPLAY_SCORE = 0.4

_NOISE_SCALE = flags.DEFINE_float(
    "noise_scale", 1.0, "Factor of the scenes' label noise; 0 and 2 are the controls."
)

ROWS = (
    Row("baseline", "smooth_l1", "hard", "none"),
    Row("soft_nms", "smooth_l1", "soft_gaussian", "none"),
    Row("kl", "kl", "hard", "none"),
    Row("kl_voting", "kl", "hard", "variance"),
    Row("kl_soft_nms", "kl", "soft_gaussian", "none"),
    Row("kl_voting_soft_nms", "kl", "soft_gaussian", "variance"),
)
LOSSES = ("smooth_l1", "kl")


def overrides() -> dict[str, object]:
    """Returns the config fields that the flags set, beside the loss."""
    fields = {"seed": runs.SEED.value, **runs.schedule_fields(), **runs.preset_fields()}
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
    text = tables.table1_markdown(rows, meta=meta, comparable=meta["preset"] == "full")
    write_atomically(workdir / "table.md", text)
    plot_ap_over_iou(
        rows, workdir / "ap_over_iou.png", title=f"Table 1, {meta['data']}, seed {rows[0]['seed']}"
    )


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    started = time.perf_counter()
    preset = runs.PRESET.value
    workdir, path, fields = runs.workdir("table1"), runs.CONFIGS[preset], overrides()
    if runs.DRY_RUN.value:
        for loss in LOSSES:
            print(runs.command(path, f"loss={loss}", fields, workdir / loss))
        return
    configs = {loss: runs.load_config(path, f"loss={loss}", fields) for loss in LOSSES}
    rows = [
        row
        for loss in LOSSES
        for row in runs.train_and_evaluate(configs[loss], workdir / loss, rows_of(loss))
    ]
    source = Job(config=configs["kl"], workdir=Workdir(workdir / "kl")).eval_source
    meta = {
        "preset": preset,
        "data": source.name,
        "data_fingerprint": getattr(source, "fingerprint", None),
        "machine": runs.machine(),
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
