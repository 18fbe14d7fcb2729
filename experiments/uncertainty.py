"""Scores of the stds: coverage, likelihood and order, before and after calibration, on images kept apart.

    python -m experiments.uncertainty --preset=mini
    python -m experiments.uncertainty --preset=mini --networks_dir=runs/table1_mini

Three networks of equal schedule, with smooth-L1, with KL Loss and with an IoU head (those of Table 5,
`experiments/networks.py`), trained where they are missing. A temperature is fitted to the KL network's stds under each
post-processing on the calibration split; everything that is reported is measured on the test split, whose images are
used neither in training nor in calibration. Finished evaluations are skipped. The workdir then holds

    table.md, table.json      the scores
    reliability.png           the calibration curve of each edge, before and after
    agreement.png             scores, stds and predicted IoUs against the IoU
    hidden_edges.png          stds of hidden and of blurred edges against those of the clear edges of the same box
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from experiments import networks, runs
from experiments.networks import Network
from experiments.runs import BASELINE, KL, Row
from klbox_jax import cli
from klbox_jax.data.scenes import ScenesSource
from klbox_jax.evaluation.calibration_error import LEVELS
from klbox_jax.evaluation.hidden_edge_stds import EdgePairs, pair_edges
from klbox_jax.evaluation.matching import match_detections
from klbox_jax.evaluation.score_iou_correlation import localization_confidences
from klbox_jax.evaluation.temperature import scale_stds
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.main import run
from klbox_jax.report import columns
from klbox_jax.report.columns import format_number, numbers
from klbox_jax.report.plots import Scatter, plot_reliability, plot_scatters
from klbox_jax.report.tables import LABELS
from klbox_jax.serving.calibrate import fit_temperatures

SPLIT = "test"
FULL = {"suppression": "soft_gaussian", "voting": "variance"}
ROWS = (
    BASELINE,
    Row("baseline_soft_nms", "smooth_l1", "soft_gaussian", "none"),
    KL,
    Row("kl_full", "kl", **FULL, settings={"voting_variance": "average"}),
    Row("kl_full_fused", "kl", **FULL, settings={"voting_variance": "fused"}),
    Row("kl_full_winner", "kl", **FULL, settings={"voting_variance": "winner"}),
    Row("iou_net", "iou_net", "hard", "none"),
)
LOSSES = ("smooth_l1", "kl", "iou_net")
# Keys of the scores of raw and calibrated stds in an entry.
STDS = {"raw": "uncertainty", "calibrated": "uncertainty_calibrated"}
# The row in the figures.
SHOWN = "kl_full"
# An edge is hidden if at least this share of its outermost strip is, and blurred if it is not hidden and its blur is at
# least this number of pixels; a clear edge is below both of the last two.
HIDDEN, BLURRED = 0.5, 2.0
CLEAR_HIDDEN, CLEAR_BLUR = 0.05, 1.0

# Columns of the tables, each of the record of one row.
PRECISION = (
    *map(columns.text, LABELS),
    *numbers(".1f", {"AP": "AP", "AP50": "AP50", "AP90": "AP90", "LRP/oLRP": "oLRP", "PDQ/PDQ": "PDQ"}),
    *numbers(".3f", {"agreement/score": "score, IoU", "agreement/relative_std": "std, IoU"}),
    *numbers(".3f", {"agreement/predicted_iou": "predicted IoU, IoU"}),
)
SCORES = (
    *(columns.text("name"), columns.text("stds")),
    *numbers(".3f", {"NLL": "NLL", **{f"coverage_{n}sigma": f"{n} std" for n in (1, 2, 3)}}),
    *numbers(".3f", {"ENCE": "ENCE", "AUSE": "AUSE", "energy_score": "energy score"}),
    *numbers(".2f", {"sharpness": "mean std"}),
    *numbers(".3f", {"calibration/ECE": "ECE"}),
)
ORDER = (
    columns.text("name"),
    *numbers(".3f", {"spearman_relative": "std/side", "spearman_relative_of_size": "of size"}),
    *numbers(".3f", {"spearman": "std", "spearman_of_size": "of size, pixels", "worst_edge": "worst edge"}),
    *numbers("d", {"num_worst_edge": "boxes with one"}),
    *numbers(".2f", {"median_ratio": "median ratio"}),
)
EDGES = ("x1", "y1", "x2", "y2")
TEMPERATURES = (columns.text("name"), columns.text("method"), *numbers(".3f", EDGES))
PARTS = (
    *(columns.text("name"), columns.text("part", "detections that are")),
    *numbers("d", {"num": "detections"}),
    *numbers(".2f", ("RMSE",)),
    *numbers(".3f", {"NLL": "NLL", "entropy": "entropy", "energy_score": "energy score"}),
    *numbers(".2f", ("spread",)),
)
UNCLEAR = (
    columns.text("edges"),
    *numbers("d", {"num": "boxes"}),
    *numbers(".3f", {"share_larger": "share larger"}),
    *numbers(".2f", {"median_ratio": "median ratio", "true_median_ratio": "true ratio"}),
)


def config_of(network: Network) -> ml_collections.ConfigDict:
    """Returns the network's config, to be evaluated on the test split."""
    config = network.config()
    config.data.eval_split = SPLIT
    return config


def evaluate(network: Network, rows: Sequence[Row]) -> list[dict]:
    """Returns the table's entries for rows of a network; trains and evaluates only what is missing.

    Each has the row's labels, AP, LRP and PDQ, `uncertainty` of `klbox_jax.evaluation.uncertainty`, Spearman's
    correlations with the IoU as `agreement`, and, with variances, the fitted temperatures as `calibration` and the
    scores after them as `uncertainty_calibrated`.
    """
    run(network.config(), str(network.workdir), "train")
    config = config_of(network)
    job = runs.job_of(config, network.workdir)
    stored = [dataclasses.replace(row, name=f"{SPLIT}/{row.name}") for row in rows]
    metrics = runs.evaluate_rows(config, network.workdir, job.total_steps, stored)
    settings = {row.name: runs.postprocess_settings(config, row) for row in rows}
    has_variances = job.model.roi_heads.box_loss.has_variances
    fitted = fit_temperatures(job, settings) if has_variances else {}
    truth = job.eval_source.coco_ground_truth()
    entries = []
    for row in rows:
        found = metrics[f"{SPLIT}/{row.name}"]
        detections = runs.read_detections(network.workdir, job.total_steps, f"{SPLIT}/{row.name}")
        kept = ("AP", "AP50", "AP90", "LRP", "PDQ", "uncertainty")
        entry = row.labels() | {key: found[key] for key in kept}
        entry["agreement"] = localization_confidences(truth, detections).spearman()
        if row.name in fitted:
            temperature = np.array(fitted[row.name]["temperature"])
            entry["calibration"] = {
                key: part for key, part in fitted[row.name].items() if key != "edge_calibration"
            }
            entry["uncertainty_calibrated"] = evaluate_uncertainty(truth, scale_stds(detections, temperature))
        entries.append(entry | {"seed": config.seed, "steps": job.total_steps})
    return entries


def unclear_edges(source: ScenesSource, detections: list[dict]) -> dict[str, EdgePairs]:
    """Returns the pairs of hidden and of blurred edges with clear ones."""
    matches = match_detections(source.coco_ground_truth(), detections)
    # The scenes have no crowds, so the objects are the annotations, in the order of the records.
    hidden = np.concatenate([detail["edge_hidden"] for detail in source.details])
    blur = np.concatenate([detail["blur"] for detail in source.details])
    clear = (hidden < CLEAR_HIDDEN) & (blur < CLEAR_BLUR)
    return {
        "hidden": pair_edges(matches, clear, hidden >= HIDDEN),
        "blurred": pair_edges(matches, clear, (blur >= BLURRED) & (hidden < CLEAR_HIDDEN)),
    }


def draw(rows: Sequence[Mapping], source: ScenesSource, workdir: pathlib.Path, *, title: str) -> dict:
    """Draws the three figures; returns the summary of hidden and blurred edges."""
    by_name = {row["name"]: row for row in rows}
    shown = by_name[SHOWN]
    curves = {stds: shown[key]["calibration"]["curve"] for stds, key in STDS.items()}
    plot_reliability(curves, workdir / "reliability.png", levels=LEVELS.tolist(), title=f"{SHOWN}, {title}")

    truth, panels = source.coco_ground_truth(), []
    detections = {}
    for name in ("baseline", SHOWN, "iou_net"):
        network = Network("one_level", by_name[name]["loss"])
        detections[name] = runs.read_detections(network.workdir, shown["steps"], f"{SPLIT}/{name}")
    for name, quantity, key, label in (
        ("baseline", "scores", "score", "score"),
        (SHOWN, "scores", "score", "score"),
        (SHOWN, "relative_stds", "relative_std", "mean std / side of the edges"),
        ("iou_net", "predicted_ious", "predicted_iou", "predicted IoU"),
    ):
        found = localization_confidences(truth, detections[name])
        title_of = f"{name}: Spearman {format_number(by_name[name]['agreement'][key], '.3f')}"
        panels.append(
            Scatter(getattr(found, quantity), found.ious, label, "IoU with the exact box", title_of)
        )
    plot_scatters(panels, workdir / "agreement.png", title=f"Matched detections, {title}")

    pairs = unclear_edges(source, detections[SHOWN])
    summary = {kind: found.summary() for kind, found in pairs.items()}
    panels = []
    for kind, found in pairs.items():
        share, num = format_number(summary[kind]["share_larger"], ".0%"), summary[kind]["num"]
        labels = ("std of the clear edges of the box, pixels", f"std of its {kind} edges, pixels")
        larger = f"{kind}: larger in {share} of {num} boxes"
        panels.append(Scatter(found.clear, found.other, *labels, larger, is_ratio=True))
    plot_scatters(panels, workdir / "hidden_edges.png", title=f"{SHOWN}, {title}")
    return summary


def table_markdown(
    rows: Sequence[Mapping], edges: Mapping[str, Mapping], *, meta: Mapping[str, object]
) -> str:
    """Returns the tables: precision, stds before and after, their order, temperatures, kinds of detections, edges."""
    learnt = [row for row in rows if "calibration" in row]
    true_stds = {row["name"]: row["uncertainty"]["true_std"] for row in learnt}
    order = [scores | {"name": name} for name, scores in true_stds.items() if scores]
    temperatures = [
        {"name": row["name"], "method": method, **dict(zip(EDGES, factors, strict=True))}
        for row in learnt
        for method, factors in row["calibration"]["factors"].items()
    ]
    return columns.page(
        columns.listing(meta),
        "AP, optimal LRP (lower is better) and PDQ in per cent; Spearman's correlation of the score, of the mean std / "
        "side, and of an IoU head's prediction, with the IoU, over matched detections (best scores first, IoU 0.5 or "
        "more, any score):",
        columns.table(PRECISION, rows),
        "Matched detections against the labels as annotated, stds as predicted and multiplied by the temperature of "
        "their edge. NLL of an edge in nats; share of labels within 1, 2 and 3 stds, of a Gaussian .683, .954 and "
        ".997; energy score and mean std in pixels:",
        columns.table(SCORES, _scores(learnt)),
        "Order of the raw stds of matched detections against the true stds of the label noise: Spearman's "
        "correlation of std / side and of the std in pixels, next to that of the box's size alone; share of "
        "boxes with one clearly worst edge (1.5 times the next or more) whose largest std is that edge's, .25 by "
        "chance; predicted over true std:",
        columns.table(ORDER, order),
        "Temperature of each edge, fitted on the calibration split:",
        columns.table(TEMPERATURES, temperatures),
        "Raw stds by the kind of detection; RMSE against the exact box, entropy in nats, spread in pixels:",
        columns.table(PARTS, _parts(learnt)),
        f"Mean raw std of hidden (half the strip or more) and of blurred (2 pixels or more) edges of {SHOWN} against "
        "that of the clear edges of the same box:",
        columns.table(UNCLEAR, [{"edges": kind} | found for kind, found in edges.items()]),
    )


def _scores(rows: Sequence[Mapping]) -> list[dict]:
    """Scores of the stds of each row, as predicted and calibrated."""
    return [row[key] | {"name": row["name"], "stds": stds} for row in rows for stds, key in STDS.items()]


def _parts(rows: Sequence[Mapping]) -> list[dict]:
    """Scores of the raw stds of each row, by the kind of detection."""
    found = []
    for row in rows:
        scores = row["uncertainty"]
        kinds = {
            "true positives": scores,
            **{kind.replace("_", " "): scores[kind] for kind in ("duplicates", "localization_errors")},
            "false positives": scores["false_positives"],
        }
        for part, of_part in kinds.items():
            num = of_part.get("num", of_part.get("num_matched"))
            found.append(of_part | {"name": row["name"], "part": part, "num": num})
    return found


def main(_: list[str]) -> None:
    """Trains, calibrates and evaluates what is missing, then writes the tables and figures."""
    workdir = runs.workdir("uncertainty")
    runs.check_preset("uncertainty", "mini")
    wanted = {loss: Network("one_level", loss) for loss in LOSSES}
    if runs.DRY_RUN.value:
        print(networks.plan("uncertainty", list(wanted.values())))
        return
    rows = [
        entry
        for loss, network in wanted.items()
        for entry in evaluate(network, [row for row in ROWS if row.loss == loss])
    ]
    kl = wanted["kl"]
    source = runs.job_of(config_of(kl), kl.workdir).eval_source
    shown = next(row for row in rows if row["name"] == SHOWN)
    meta = runs.meta_of_source(source) | {
        "calibrated on": shown["calibration"]["data"],
        "method": shown["calibration"]["method"],
        "seed": rows[-1]["seed"],
        "steps": rows[-1]["steps"],
        "networks": str(kl.workdir.parent),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    edges = draw(rows, source, workdir, title=f"{source.name}, seed {meta['seed']}")
    text = table_markdown(rows, edges, meta=meta)
    runs.write_result(workdir, {"rows": rows, "edges": edges, **meta}, text)
    print(text)


if __name__ == "__main__":
    cli.start(main)
