"""Compares every loss, suppression, voting, fusion and refinement on one detector, in one table.

    python -m experiments.methods --preset=mini --workdir=runs/methods_mini
    python -m experiments.methods --preset=aquarium --data_root=FOLDER --init_weights=FILE.pth

A network is trained for each loss, all with the same schedule, coder, normalizer and data order; the schedule of
`mini` is shorter than Table 1's. Each is evaluated under a few post-processings, the KL network under all of them,
and a network with an IoU head under IoU-Net's three stages. With `--seeds=3` the losses in `REPEATED` are trained
with three seeds, and paired differences show which gains are certain. Finished work is skipped, interrupted work is
resumed.

    table.md, table.json      the rows
    SEED/NETWORK/             the runs: checkpoints, metrics, detections of every row
"""

import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import runs
from experiments.inference_time import load_on_device, median_seconds
from experiments.runs import Row
from klbox_jax import cli
from klbox_jax.evaluation.confidence import student_interval
from klbox_jax.evaluation.eval_step import detect_batch
from klbox_jax.files import read_json, write_json
from klbox_jax.report import columns
from klbox_jax.report.columns import interval_text, number, numbers
from klbox_jax.report.tables import LABELS, markdown_table

_NETWORKS = flags.DEFINE_list("networks", [], "Only these networks; all by default.")

VARIANCE_LOSSES = (
    *("kl", "kl_note", "gaussian_nll", "beta_nll", "laplace_nll", "gaussian_kl", "lasernet_kl"),
    *("energy_score", "direct_moment_matching"),
)
# `kl_piecewise` is the same function as `kl`, so it has no network of its own.
NETWORKS = ("smooth_l1", "l1", *VARIANCE_LOSSES, "iou_net")
REPEATED = ("smooth_l1", "kl", "gaussian_nll", "lasernet_kl", "energy_score", "iou_net")
NUM_EPOCHS = {"mini": 3.0, "aquarium": 16.0}
METRICS = ("AP", "AP50", "AP75", "AP90")
# Timed runs of each post-processing.
REPEATS = 9
UNCERTAINTY = ("NLL", "coverage_1sigma", "spearman_sigma_error")
# The stages of IoU-Net: text, row, and the row before.
IOU_NET_STAGES = (
    ("IoU head, unused, over smooth_l1", "iou_net-hard-none", "smooth_l1-hard-none"),
    ("+ IoU-guided NMS", "iou_net-iou_guided-none", "iou_net-hard-none"),
    ("+ refinement", "iou_net-iou_guided-none-refined", "iou_net-iou_guided-none"),
)


def rows_of(network: str) -> tuple[Row, ...]:
    """Returns the post-processings under which a network is evaluated; the first is the plain one."""

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
    # Ours, `variance_score`, is not here: experiments/beyond.py chooses and measures it.
    suppressions = ("hard", "soft_linear", "soft_gaussian")
    votings = ("variance", "iou", "iou_score", "box_voting", "wbf", "bayes")
    return (
        *plain,
        row("soft_linear", "none"),
        *(row(suppression, voting) for suppression in suppressions for voting in votings),
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
        # Photographs have no stds of their label noise: a fiftieth of the box is assumed.
        fields |= {
            "model.box_loss_settings.label_noise": "size",
            "model.box_loss_settings.label_noise_value": 0.02,
        }
    if network == "iou_net":
        return "loss=smooth_l1,iou_head=True", fields
    return f"loss={network}", fields


def postprocess_milliseconds(config, workdir: pathlib.Path, rows: Sequence[Row]) -> dict[str, float]:
    """Returns the median milliseconds an image of each row's post-processing, measured in turn on one batch.

    They are measured once, and kept in `post_ms.json`.
    """
    file = workdir / "post_ms.json"
    known = read_json(file) if file.exists() else {}
    missing = [row for row in rows if row.name not in known]
    if missing:
        job = runs.job_of(config, workdir)
        params, batch = load_on_device(job)

        @jax.jit
        def predict(params, batch):
            return job.model.apply({"params": params}, batch, method="predict")

        arguments = (params, predict(params, batch), batch)
        steps = {}
        for row in missing:
            settings = runs.postprocess_settings(config, row)
            step = jax.jit(functools.partial(detect_batch, model=job.model, settings=settings))
            steps[row.name] = functools.partial(step, *arguments)
        seconds = median_seconds(steps, repeats=REPEATS)
        known |= {name: 1000 * value / len(batch.image_id) for name, value in seconds.items()}
        write_json(file, known)
    return {row.name: known[row.name] for row in rows}


def run_network(network: str, seed: int, workdir: pathlib.Path) -> list[dict]:
    """Returns the rows of one network; trains, evaluates and measures only what is missing."""
    config = runs.preset_config(*arg_and_fields(network, seed))
    folder = workdir / f"seed{seed}" / network
    rows = rows_of(network)
    entries = runs.train_and_evaluate(config, folder, rows)
    milliseconds = postprocess_milliseconds(config, folder, rows)
    # The other uncertainty scores of an evaluation stay in its metrics.json.
    return [
        {key: value for key, value in entry.items() if key != "uncertainty"}
        | {key: entry["uncertainty"][key] for key in UNCERTAINTY}
        | {"post_ms": milliseconds[entry["name"]]}
        for entry in entries
    ]


def best(rows: Sequence[Mapping], network: str, seed: int) -> Mapping:
    """Returns the row of the highest AP of a network and seed."""
    return max((r for r in rows if r["loss"] == network and r["seed"] == seed), key=lambda r: r["AP"])


def claims(rows: Sequence[Mapping], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Returns, by seed, the gains in AP90 of the losses over smooth-L1, and of IoU-Net's stages over the one before.

    A gain is over the seeds for which both networks are trained; one without such a seed is left out.
    """
    trained = {(row["loss"], row["seed"]) for row in rows}
    by_name = {(row["name"], row["seed"]): row["AP90"] for row in rows}
    gains: dict[str, list[float]] = {}
    for seed in seeds:
        if ("smooth_l1", seed) not in trained:
            continue
        base = best(rows, "smooth_l1", seed)["AP90"]
        for network in VARIANCE_LOSSES:
            if (network, seed) in trained:
                gain = best(rows, network, seed)["AP90"] - base
                gains.setdefault(f"{network} over smooth_l1, best rows", []).append(gain)
        for name, ours, theirs in IOU_NET_STAGES:
            if ("iou_net", seed) in trained:
                gains.setdefault(name, []).append(by_name[ours, seed] - by_name[theirs, seed])
    return gains


def claim_cells(name: str, gains: Sequence[float]) -> list[str]:
    """Returns the name, the gain of each seed, their mean, its interval, and yes if all are above 0."""
    by_seed, interval = "  ".join(f"{gain:+.2f}" for gain in gains), interval_text(student_interval(gains))
    return [name, by_seed, f"{np.mean(gains):+.2f}", interval, "yes" if min(gains) > 0 else "no"]


def table_markdown(rows: Sequence[Mapping], *, meta: Mapping[str, object]) -> str:
    """Returns the tables: the losses, the post-processings of the KL network, IoU-Net's stages, the differences."""
    row_columns = [
        *(*map(columns.text, LABELS), *numbers(".1f", METRICS), *numbers(".3f", UNCERTAINTY)),
        *(number("post_ms", ".2f"), *numbers("d", ("seed", "steps")), number("seconds", ".0f")),
    ]
    seeds = sorted({row["seed"] for row in rows})
    networks = [name for name in NETWORKS if any(row["loss"] == name for row in rows)]
    first = seeds[0]
    of_seed = [row for row in rows if row["seed"] == first]
    parts = [
        columns.listing(meta),
        "Each loss under the post-processing of its highest AP among those tried, which table.json lists; the "
        "choice was made on the images of the table:",
        columns.table(row_columns, [best(rows, name, first) for name in networks]),
    ]
    titles = {
        "kl": "Each post-processing on the KL network:",
        "iou_net": "IoU-Net on a smooth-L1 network, stage by stage:",
    }
    for network, title in titles.items():
        if network in networks:
            of_network = [row for row in of_seed if row["loss"] == network]
            parts += [title, columns.table(row_columns, of_network)]
    differences = claims(rows, seeds)
    if differences:
        headings = ("difference", "by seed", "mean", "95 % interval", "all above 0")
        cells = [claim_cells(*claim) for claim in differences.items()]
        parts += [
            f"Differences in AP90 by seed ({', '.join(map(str, seeds))} where trained):",
            markdown_table(headings, cells, text_columns=(headings[1], *headings[3:])),
        ]
    return columns.page(
        *parts,
        "AP in per cent. NLL of each edge in nats, coverage and rank correlation over detections matched with an "
        "object at IoU 0.5, against the labels as annotated. post_ms: post-processing of one image.",
    )


def main(_: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
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
        # Written after each network, so that the table can be read while the rest runs.
        meta = runs.meta_of(rows[0])
        text = table_markdown(rows, meta=meta)
        runs.write_result(workdir, {"rows": rows, **meta}, text)
    print(text)
    print(f"{time.perf_counter() - started:.0f} seconds. Everything is in {workdir}.")


if __name__ == "__main__":
    cli.start(main)
