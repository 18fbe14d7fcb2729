"""Every loss, suppression, voting, fusion and refinement on one detector, in one table.

    python -m experiments.methods --preset=mini --workdir=runs/methods_mini
    python -m experiments.methods --preset=aquarium --data_root=FOLDER --init_weights=FILE.pth

A network is trained for each loss, all with the same schedule, coder, normalizer and data order; the schedule of
`mini` is shorter than Table 1's. Each is evaluated under a few post-processings, the KL network under all of them,
and a network with an IoU head under IoU-Net's three stages. With `--seeds=3` the losses in `REPEATED` are trained
with three seeds, and paired differences tell what holds. Finished work is skipped, interrupted work goes on.

    table.md, table.json      the rows
    SEED/NETWORK/             the runs: checkpoints, metrics, detections of every row
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import runs
from experiments.rows import Row
from experiments.seeds import interval_text, student_interval
from klbox_jax import distributed
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.data.loader import eval_batches
from klbox_jax.evaluation.eval_step import detect_batch
from klbox_jax.files import read_json, write_atomically, write_json
from klbox_jax.report.tables import markdown_table
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir

_NETWORKS = flags.DEFINE_list("networks", [], "Only these networks; all by default.")

VARIANCE_LOSSES = (
    "kl",
    "kl_note",
    "gaussian_nll",
    "beta_nll",
    "laplace_nll",
    "gaussian_kl",
    "lasernet_kl",
    "energy_score",
    "direct_moment_matching",
)
# `kl_piecewise` is the same function as `kl`, so it has no network of its own.
NETWORKS = ("smooth_l1", "l1", *VARIANCE_LOSSES, "iou_net")
REPEATED = ("smooth_l1", "kl", "gaussian_nll", "lasernet_kl", "energy_score", "iou_net")
NUM_EPOCHS = {"mini": 3.0, "aquarium": 16.0}
METRICS = ("AP", "AP50", "AP75", "AP90")
UNCERTAINTY = ("NLL", "coverage_1sigma", "spearman_sigma_error")


def rows_of(network: str) -> tuple[Row, ...]:
    """Returns the post-processings that a network is evaluated under; the first is the plain one."""

    def row(suppression: str, voting: str, tag: str = "", **settings: Any) -> Row:
        name = "-".join(filter(None, (network, suppression, voting, tag)))
        return Row(name, network, suppression, voting, settings)

    plain = (row("hard", "none"), row("soft_gaussian", "none"))
    if network == "iou_net":
        # The paper's stages: the head trained but not used, IoU-guided NMS, and refinement on top of it.
        return (
            *plain,
            row("iou_guided", "none"),
            row("iou_guided", "none", "refined", refine_steps=5),
            row("iou_guided", "none", "refined_best", refine_steps=5, refine_keep_best=True),
            row("iou_guided", "none", "refined_by_iou", refine_steps=5, score_by_iou=True),
        )
    if network not in VARIANCE_LOSSES:
        return (*plain, row("soft_gaussian", "iou"), row("soft_gaussian", "iou_score"))
    if network != "kl":
        return (*plain, row("hard", "variance"), row("soft_gaussian", "variance"))
    # Of others; ours, `variance_score`, is chosen and measured in experiments/beyond.py.
    votings = ("variance", "iou", "iou_score", "box_voting", "wbf", "bayes")
    return (
        *plain,
        row("soft_linear", "none"),
        *(
            row(suppression, voting)
            for suppression in ("hard", "soft_linear", "soft_gaussian")
            for voting in votings
        ),
        row("soft_gaussian", "variance", "fused", voting_variance="fused"),
        row("soft_gaussian", "variance", "winner", voting_variance="winner"),
    )


def arg_and_fields(network: str, seed: int) -> tuple[str, dict[str, object]]:
    """Returns the argument of the config file, and the fields to replace."""
    fields: dict[str, object] = {
        "seed": seed,
        "train.num_epochs": runs.NUM_EPOCHS.value or NUM_EPOCHS[runs.PRESET.value],
        **runs.preset_fields(),
    }
    if runs.PRESET.value != "mini":
        # Photographs do not say how far their labels are off: a fiftieth of the box.
        fields |= {
            "model.box_loss_settings.label_noise": "size",
            "model.box_loss_settings.label_noise_value": 0.02,
        }
    if network == "iou_net":
        return "loss=smooth_l1,iou_head=True", fields
    return f"loss={network}", fields


def postprocess_milliseconds(
    config, workdir: pathlib.Path, rows: Sequence[Row], *, repeats: int = 9
) -> dict[str, float]:
    """Returns the median milliseconds an image that each row's post-processing takes, in turn, on one batch.

    Measured once and kept in `post_ms.json`, beside the row's settings.
    """
    file = workdir / "post_ms.json"
    known = read_json(file) if file.exists() else {}
    missing = [row for row in rows if row.name not in known]
    if missing:
        job = Job(config=config, workdir=Workdir(workdir))
        _, params = restore_params(job.workdir.checkpoints)
        params = jax.device_put(params, distributed.replicated(job.mesh))
        batch = next(iter(eval_batches(job.eval_source, job.eval_plan, job.preprocessing, num_threads=1)))
        batch = distributed.put_batch(batch, job.mesh)
        predictions = jax.jit(
            lambda params, batch: job.model.apply({"params": params}, batch, method="predict")
        )(params, batch)
        for row in missing:
            settings = runs.postprocess_settings(config, row)

            def post(params, predictions, batch, settings=settings):
                return detect_batch(params, predictions, batch, model=job.model, settings=settings)

            compiled = jax.jit(post)
            seconds = []  # the first one compiles
            for _ in range(repeats + 1):
                started = time.perf_counter()
                jax.block_until_ready(compiled(params, predictions, batch))
                seconds.append(time.perf_counter() - started)
            known[row.name] = 1000 * float(np.median(seconds[1:])) / len(batch.image_id)
        write_json(file, known)
    return {row.name: known[row.name] for row in rows}


def run_network(network: str, seed: int, workdir: pathlib.Path) -> list[dict]:
    """Returns the rows of one network, doing what is not yet done."""
    arg, fields = arg_and_fields(network, seed)
    config = runs.load_config(runs.CONFIGS[runs.PRESET.value], arg, fields)
    folder = workdir / f"seed{seed}" / network
    rows = rows_of(network)
    entries = runs.train_and_evaluate(config, folder, rows)
    milliseconds = postprocess_milliseconds(config, folder, rows)
    # The rest of an evaluation's uncertainty scores stays in its metrics.json.
    return [
        {key: value for key, value in entry.items() if key != "uncertainty"}
        | {key: entry["uncertainty"][key] for key in UNCERTAINTY}
        | {"post_ms": milliseconds[entry["name"]]}
        for entry in entries
    ]


def best(rows: Sequence[Mapping], network: str, seed: int) -> Mapping:
    """Returns the row of the highest AP of a network and seed."""
    return max((r for r in rows if r["loss"] == network and r["seed"] == seed), key=lambda r: r["AP"])


@dataclasses.dataclass(frozen=True)
class Claim:
    """A difference in AP90 between two rows of the same seed, over seeds."""

    name: str
    differences: tuple[float, ...]

    def cells(self) -> list[str]:
        """Returns name, each seed's difference, mean, its interval, and whether all are above 0."""
        values = np.array(self.differences)
        return [
            self.name,
            "  ".join(f"{value:+.2f}" for value in values),
            f"{values.mean():+.2f}",
            interval_text(student_interval(self.differences)),
            "yes" if (values > 0).all() else "no",
        ]


def claims(rows: Sequence[Mapping], seeds: Sequence[int]) -> list[Claim]:
    """Returns what the losses add over smooth-L1, and each stage of IoU-Net over the one before."""
    trained = {(row["loss"], row["seed"]) for row in rows}
    found = []

    def add(name: str, ours, base, needed: Sequence[str]) -> None:
        used = [seed for seed in seeds if all((network, seed) in trained for network in needed)]
        if used:
            differences = tuple(ours(seed)["AP90"] - base(seed)["AP90"] for seed in used)
            found.append(Claim(name=name, differences=differences))

    for network in VARIANCE_LOSSES:
        add(
            f"{network} over smooth_l1, best rows",
            lambda seed, network=network: best(rows, network, seed),
            lambda seed: best(rows, "smooth_l1", seed),
            (network, "smooth_l1"),
        )

    def stage(name: str):
        return lambda seed: next(r for r in rows if (r["name"], r["seed"]) == (name, seed))

    stages = (
        ("IoU head, unused, over smooth_l1", "iou_net-hard-none", "smooth_l1-hard-none"),
        ("+ IoU-guided NMS", "iou_net-iou_guided-none", "iou_net-hard-none"),
        ("+ refinement", "iou_net-iou_guided-none-refined", "iou_net-iou_guided-none"),
    )
    for name, ours, base in stages:
        add(name, stage(ours), stage(base), ("iou_net", "smooth_l1"))
    return found


def table_markdown(rows: Sequence[Mapping], *, meta: Mapping[str, object]) -> str:
    """Returns the tables: the losses, the post-processings of the KL network, IoU-Net's stages, the differences."""
    labels = ("name", "loss", "suppression", "voting")
    columns = (*labels, *METRICS, *UNCERTAINTY, "post_ms", "seed", "steps", "seconds")

    def cells(row: Mapping) -> list[str]:
        def number(key: str, form: str) -> str:
            return "-" if row.get(key) is None else form.format(row[key])

        return (
            [row[key] for key in labels]
            + [number(key, "{:.1f}") for key in METRICS]
            + [number(key, "{:.3f}") for key in UNCERTAINTY]
            + [number("post_ms", "{:.2f}"), number("seed", "{:d}")]
            + [number("steps", "{:d}"), number("seconds", "{:.0f}")]
        )

    def table(chosen: Sequence[Mapping]) -> str:
        return markdown_table(columns, [cells(row) for row in chosen], text_columns=labels)

    seeds = sorted({row["seed"] for row in rows})
    networks = [name for name in NETWORKS if any(row["loss"] == name for row in rows)]
    first = seeds[0]
    of_seed = [row for row in rows if row["seed"] == first]
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        "Each loss under the post-processing of its highest AP among those tried, which table.json lists; the "
        "choice was made on the images of the table:",
        table([best(rows, name, first) for name in networks]),
    ]
    for title, network in (
        ("Each post-processing on the KL network:", "kl"),
        ("IoU-Net on a smooth-L1 network, stage by stage:", "iou_net"),
    ):
        if network in networks:
            parts += [title, table([row for row in of_seed if row["loss"] == network])]
    differences = claims(rows, seeds)
    if differences:
        parts += [
            f"Differences in AP90 by seed ({', '.join(map(str, seeds))} where trained):",
            markdown_table(
                ("difference", "by seed", "mean", "95 % interval", "all above 0"),
                [claim.cells() for claim in differences],
                text_columns=("by seed", "95 % interval", "all above 0"),
            ),
        ]
    parts.append(
        "AP in per cent. NLL of each edge in nats, coverage and rank correlation over detections matched with an "
        "object at IoU 0.5, against the labels as annotated. post_ms: post-processing of one image."
    )
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    started = time.perf_counter()
    runs.check_preset("methods", *NUM_EPOCHS)
    workdir = runs.workdir("methods")
    unknown = set(_NETWORKS.value) - set(NETWORKS)
    if unknown:
        raise ValueError(
            f"--networks={','.join(sorted(unknown))} is unknown; choose of {', '.join(NETWORKS)}"
        )
    wanted = [
        (seed, network)
        for seed in range(runs.SEED.value, runs.SEED.value + runs.SEEDS.value)
        for network in (_NETWORKS.value or (NETWORKS if seed == runs.SEED.value else REPEATED))
    ]
    if runs.DRY_RUN.value:
        for seed, network in wanted:
            path = runs.CONFIGS[runs.PRESET.value]
            print(runs.command(path, *arg_and_fields(network, seed), workdir / f"seed{seed}" / network))
        return
    rows: list[dict] = []
    for seed, network in wanted:
        rows += run_network(network, seed, workdir)
        # Whoever looks in while it runs finds the table so far.
        meta = {
            "preset": runs.PRESET.value,
            "data": rows[0]["data"],
            "data_fingerprint": rows[0]["data_fingerprint"],
            "machine": runs.machine(),
        }
        write_json(workdir / "table.json", {"rows": rows, **meta})
        write_atomically(workdir / "table.md", table_markdown(rows, meta=meta))
    print((workdir / "table.md").read_text())
    print(f"{time.perf_counter() - started:.0f} seconds. Everything lies in {workdir}.")


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
