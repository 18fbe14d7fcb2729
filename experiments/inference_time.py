"""Table 4 of He et al. 2019: the time of inference with variance voting, and without.

    python -m experiments.paper_tables --table=4 --preset=mini
    python -m experiments.paper_tables --table=4 --preset=full --data_root=COCO_FOLDER --init_weights=VGG16.pkl

A network with smooth-L1 under hard NMS, and one with KL Loss under voting, without and with soft-NMS. Each compiled
eval step, from a batch to its detections, is run in turn with the others on one batch on the device; the table has
medians. Each call measures again, on the device that it runs on; the networks are trained where they are missing
(`experiments/networks.py`).

    table.md, table.json      milliseconds of an image, and their ratio to the baseline's
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import flags

from experiments import networks, runs
from experiments.networks import Network
from experiments.stored_results import paper_value
from klbox_jax import distributed
from klbox_jax.data.loader import eval_batches
from klbox_jax.evaluation.eval_step import compile_eval_step
from klbox_jax.main import run
from klbox_jax.report import columns
from klbox_jax.report.columns import Column
from klbox_jax.report.paper import PAPER_TABLE4
from klbox_jax.report.tables import LABELS, meanings
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import current_versions

_REPEATS = flags.DEFINE_integer("repeats", 21, "Timed runs of each eval step of Table 4.")

FAMILIES = {"mini": "one_level", "full": "vgg16"}
ROWS = (runs.BASELINE, runs.KL_VOTING, runs.KL_VOTING_SOFT_NMS)
LOSSES = tuple(dict.fromkeys(row.loss for row in ROWS))


def load_on_device(job: Job):
    """Returns the newest parameters of a run and its first evaluation batch, both on the device."""
    batch = next(iter(eval_batches(job.eval_source, job.eval_plan, job.preprocessing, num_threads=1)))
    _, params = restore_params(job.workdir.checkpoints)
    params = jax.device_put(params, distributed.replicated(job.mesh))
    return params, distributed.put_batch(batch, job.mesh)


def median_seconds(steps: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Returns the median seconds of each step, called to its end.

    The steps are run in turn, so that what slows the machine slows all of them. A first run of each, which compiles, is
    not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(step())
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def prepare(family: str) -> tuple[dict[str, Callable[[], object]], int]:
    """Returns each row's eval step on one batch, and the batch size; trains what is missing."""
    steps, batch = {}, None
    for row in ROWS:
        network = Network(family, row.loss)
        config = network.config()
        run(config, str(network.workdir), "train")
        job = runs.job_of(config, network.workdir)
        params, own_batch = load_on_device(job)
        batch = own_batch if batch is None else batch
        settings = {row.name: runs.postprocess_settings(config, row)}
        step = compile_eval_step(job.mesh, model=job.model, settings=settings)
        steps[row.name] = functools.partial(step, params, batch)
    return steps, len(batch.image_id)


def table_rows(seconds: Mapping[str, float], *, batch_size: int) -> list[dict]:
    """Returns milliseconds of an image, and the ratio to the baseline's."""
    base = seconds[ROWS[0].name]
    return [
        row.labels() | {"ms": 1000 * seconds[row.name] / batch_size, "ratio": seconds[row.name] / base}
        for row in ROWS
    ]


def table_markdown(rows: Sequence[Mapping], *, meta: Mapping[str, object]) -> str:
    """Returns the table, with the paper's milliseconds and their ratio."""
    own = [*map(columns.text, LABELS), columns.number("ms", ".2f"), columns.number("ratio", ".3f")]
    cells = {
        "paper's ms": paper_value(PAPER_TABLE4, ".0f"),
        "paper's ratio": paper_value(PAPER_TABLE4, ".2f", over=ROWS[0].name),
    }
    papers = [Column(heading, lambda row, cell=cell: cell(row["name"])) for heading, cell in cells.items()]
    return columns.page(
        columns.listing(meta),
        "Median milliseconds of an image, from the batch on the device to the detections on it:",
        columns.table([*own, *papers], rows),
        "The paper's numbers are VGG-16 Faster R-CNN on a GTX 1080 Ti, an image at a time. On another device only "
        "the ratio can be compared, and it depends on the share that the network has.",
        meanings([mark for _, mark in PAPER_TABLE4.values()]),
    )


def run_table4() -> None:
    """Times the rows, then writes the table."""
    preset, workdir = runs.check_preset("table4", *FAMILIES), runs.workdir("table4")
    if runs.DRY_RUN.value:
        print(networks.plan("table4", [Network(FAMILIES[preset], loss) for loss in LOSSES]))
        return
    steps, batch_size = prepare(FAMILIES[preset])
    rows = table_rows(median_seconds(steps, repeats=_REPEATS.value), batch_size=batch_size)
    meta = {
        "preset": preset,
        "batch": f"{batch_size} images",
        "repeats": _REPEATS.value,
        "machine": runs.machine(),
        "devices": current_versions()["devices"],
    }
    text = table_markdown(rows, meta=meta)
    runs.write_result(workdir, {"rows": rows, **meta}, text)
    print(text)
