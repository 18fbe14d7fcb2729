"""Table 4 of He et al. 2019: what variance voting costs at inference.

    python -m experiments.table4 --preset=mini
    python -m experiments.table4 --preset=full --data_root=COCO_FOLDER --init_weights=VGG16.pkl

A network with smooth-L1 under hard NMS, and one with KL Loss under voting, without and with soft-NMS. Each compiled
eval step, from a batch to its detections, is run in turn with the others on one batch that lies on the device: the
table has medians. It is measured anew at each call, on the device that runs; the networks are trained where they
are missing (`experiments/networks.py`).

    table.md, table.json      milliseconds of an image, and their ratio to the baseline's
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping

import jax
from absl import app, flags

from experiments import networks, runs
from experiments.networks import Network
from experiments.rows import BASELINE, KL_VOTING, KL_VOTING_SOFT_NMS
from klbox_jax import distributed
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.data.loader import eval_batches
from klbox_jax.evaluation.eval_step import compile_eval_step
from klbox_jax.files import write_atomically, write_json
from klbox_jax.main import run
from klbox_jax.report.paper import PAPER_TABLE4
from klbox_jax.report.tables import markdown_table, marked, meanings
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir, current_versions

_REPEATS = flags.DEFINE_integer("repeats", 21, "Runs of each eval step that are timed.")

FAMILIES = {"mini": "one_level", "full": "vgg16"}
ROWS = (BASELINE, KL_VOTING, KL_VOTING_SOFT_NMS)


def prepare(family: str) -> tuple[dict[str, Callable[[], object]], int]:
    """Returns each row's eval step on one batch, ready to be called, and the batch size; trains what is missing."""
    steps, batch = {}, None
    for row in ROWS:
        network = Network(family, row.loss)
        config = network.config()
        run(config, str(network.workdir), "train")
        job = Job(config=config, workdir=Workdir(network.workdir))
        if batch is None:
            batch = next(iter(eval_batches(job.eval_source, job.eval_plan, job.preprocessing, num_threads=1)))
            batch = distributed.put_batch(batch, job.mesh)
        _, params = restore_params(job.workdir.checkpoints)
        params = jax.device_put(params, distributed.replicated(job.mesh))
        settings = {row.name: runs.postprocess_settings(config, row)}
        step = compile_eval_step(job.mesh, model=job.model, settings=settings)
        steps[row.name] = functools.partial(_run_to_its_end, step, params, batch)
    return steps, len(batch.image_id)


def _run_to_its_end(step: Callable, *arguments: object) -> None:
    jax.block_until_ready(step(*arguments))


def median_seconds(steps: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Returns the median seconds of each step. They take turns, so that what slows the machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):  # the first one compiles
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def table_rows(seconds: Mapping[str, float], *, batch_size: int) -> list[dict]:
    """Returns milliseconds of an image, and the ratio to the baseline's."""
    base = seconds[ROWS[0].name]
    return [
        row.labels() | {"ms": 1000 * seconds[row.name] / batch_size, "ratio": seconds[row.name] / base}
        for row in ROWS
    ]


def table_markdown(rows: list[dict], *, meta: Mapping[str, object]) -> str:
    """Returns the table, the paper's milliseconds and their ratio beside ours."""
    labels = ("name", "loss", "suppression", "voting")
    paper_base, base_mark = PAPER_TABLE4[ROWS[0].name]

    def cells(row: Mapping) -> list[str]:
        value, mark = PAPER_TABLE4.get(row["name"], (None, ""))
        paper = (
            ["-", "-"]
            if value is None
            else [marked(f"{value:.0f}", mark), marked(f"{value / paper_base:.2f}", mark)]
        )
        return [*(row[label] for label in labels), f"{row['ms']:.2f}", f"{row['ratio']:.3f}", *paper]

    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        "Median milliseconds of an image, from the batch on the device to the detections on it:",
        markdown_table(
            (*labels, "ms", "ratio", "paper's ms", "paper's ratio"),
            [cells(row) for row in rows],
            text_columns=labels,
        ),
        "The paper's numbers are VGG-16 Faster R-CNN on a GTX 1080 Ti, an image at a time. On another device only "
        "the ratio can be compared, and it depends on the share that the network has.",
        meanings([base_mark, *(mark for _, mark in PAPER_TABLE4.values())]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def main(argv: list[str]) -> None:
    """Times the rows, then writes the table."""
    del argv
    preset, workdir = runs.check_preset("table4", *FAMILIES), runs.workdir("table4")
    family = FAMILIES[preset]
    if runs.DRY_RUN.value:
        print(
            networks.plan("table4", [Network(family, loss) for loss in dict.fromkeys(r.loss for r in ROWS)])
        )
        return
    steps, batch_size = prepare(family)
    rows = table_rows(median_seconds(steps, repeats=_REPEATS.value), batch_size=batch_size)
    meta = {
        "preset": preset,
        "batch": f"{batch_size} images",
        "repeats": _REPEATS.value,
        "machine": runs.machine(),
        "devices": current_versions()["devices"],
    }
    write_json(workdir / "table.json", {"rows": rows, **meta})
    write_atomically(workdir / "table.md", table_markdown(rows, meta=meta))
    print((workdir / "table.md").read_text())


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
