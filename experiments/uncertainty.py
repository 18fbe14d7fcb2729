"""What the stds are worth: coverage, likelihood and order, before and after calibration, on images kept apart.

    python -m experiments.uncertainty --preset=mini
    python -m experiments.uncertainty --preset=mini --networks_dir=runs/table1_mini

Three networks of equal schedule, with smooth-L1, with KL Loss and with an IoU head (those of Table 5,
`experiments/networks.py`), trained where they are missing. A temperature is fitted to the KL network's stds under each
post-processing on the calibration split; everything that is reported is measured on the test split, of which neither
training nor calibration has seen an image. What is evaluated already is not evaluated again. The workdir then holds

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
from absl import app

from experiments import networks, runs
from experiments.networks import Network
from experiments.rows import BASELINE, KL, Row
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.data.scenes import ScenesSource
from klbox_jax.evaluation.calibration_error import LEVELS
from klbox_jax.evaluation.hidden_edge_stds import EdgePairs, pair_edges
from klbox_jax.evaluation.matching import match_detections
from klbox_jax.evaluation.score_iou_correlation import localization_confidences
from klbox_jax.evaluation.temperature import scale_stds
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.files import read_json, write_atomically, write_json
from klbox_jax.main import run
from klbox_jax.report.plots import Scatter, plot_reliability, plot_scatters
from klbox_jax.report.tables import markdown_table
from klbox_jax.serving.calibrate import fit_temperatures
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir

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
# The row that the figures show.
SHOWN = "kl_full"
# An edge is hidden from this share of its outermost strip on, and blurred from so many pixels on if it is not hidden;
# a clear edge is below both of the last.
HIDDEN, BLURRED = 0.5, 2.0
CLEAR_HIDDEN, CLEAR_BLUR = 0.05, 1.0

SCORES = (
    ("NLL", "NLL", ".3f"),
    ("coverage_1sigma", "1 std", ".3f"),
    ("coverage_2sigma", "2 std", ".3f"),
    ("coverage_3sigma", "3 std", ".3f"),
    ("ENCE", "ENCE", ".3f"),
    ("AUSE", "AUSE", ".3f"),
    ("energy_score", "energy score", ".3f"),
    ("sharpness", "mean std", ".2f"),
)
TRUE_STD = (
    ("spearman_relative", "std/side", ".3f"),
    ("spearman_relative_of_size", "of size", ".3f"),
    ("spearman", "std", ".3f"),
    ("spearman_of_size", "of size, pixels", ".3f"),
    ("worst_edge", "worst edge", ".3f"),
    ("num_worst_edge", "boxes with one", "d"),
    ("median_ratio", "median ratio", ".2f"),
)
PARTS = (
    ("num", "detections", "d"),
    ("RMSE", "RMSE", ".2f"),
    ("NLL", "NLL", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("energy_score", "energy score", ".3f"),
    ("spread", "spread", ".2f"),
)


def config_of(network: Network) -> ml_collections.ConfigDict:
    """Returns the network's config, to be evaluated on the test split."""
    config = network.config()
    config.data.eval_split = SPLIT
    return config


def evaluate(network: Network, rows: Sequence[Row]) -> list[dict]:
    """Returns the entries of a network's rows, training and evaluating what is not yet done.

    Each has the row's labels, AP, LRP and PDQ, `uncertainty` of `klbox_jax.evaluation.uncertainty`, Spearman's
    correlations with the IoU as `agreement`, and, with variances, what was fitted as `calibration` and
    `uncertainty_calibrated`.
    """
    run(network.config(), str(network.workdir), "train")
    config = config_of(network)
    job = Job(config=config, workdir=Workdir(network.workdir))
    stored = [dataclasses.replace(row, name=f"{SPLIT}/{row.name}") for row in rows]
    metrics = runs.evaluate_rows(config, network.workdir, job.total_steps, stored)
    settings = {row.name: runs.postprocess_settings(config, row) for row in rows}
    has_variances = job.model.roi_heads.box_loss.has_variances
    fitted = fit_temperatures(job, settings) if has_variances else {}
    truth = job.eval_source.coco_ground_truth()
    entries = []
    for row in rows:
        found = metrics[f"{SPLIT}/{row.name}"]
        detections = _detections(network.workdir, job.total_steps, row.name)
        entry = row.labels() | {
            key: found[key] for key in ("AP", "AP50", "AP90", "LRP", "PDQ", "uncertainty")
        }
        entry["agreement"] = localization_confidences(truth, detections).spearman()
        if row.name in fitted:
            temperature = np.array(fitted[row.name]["temperature"])
            entry["calibration"] = fitted[row.name]
            entry["uncertainty_calibrated"] = evaluate_uncertainty(truth, scale_stds(detections, temperature))
        entries.append(entry | {"seed": config.seed, "steps": job.total_steps})
    return entries


def _detections(workdir: pathlib.Path, step: int, name: str) -> list[dict]:
    return read_json(workdir / "eval" / str(step) / SPLIT / name / "detections.json")


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
    curves = {
        name: shown[key]["calibration"]["curve"]
        for name, key in (("raw", "uncertainty"), ("calibrated", "uncertainty_calibrated"))
    }
    plot_reliability(curves, workdir / "reliability.png", levels=LEVELS.tolist(), title=f"{SHOWN}, {title}")

    truth, panels = source.coco_ground_truth(), []
    detections = {
        name: _detections(Network("one_level", by_name[name]["loss"]).workdir, by_name[name]["steps"], name)
        for name in ("baseline", SHOWN, "iou_net")
    }
    for name, quantity, key, label in (
        ("baseline", "scores", "score", "score"),
        (SHOWN, "scores", "score", "score"),
        (SHOWN, "relative_stds", "relative_std", "mean std / side of the edges"),
        ("iou_net", "predicted_ious", "predicted_iou", "predicted IoU"),
    ):
        found = localization_confidences(truth, detections[name])
        panels.append(
            Scatter(
                xs=getattr(found, quantity),
                ys=found.ious,
                x_label=label,
                y_label="IoU with the exact box",
                title=f"{name}: Spearman {_cell(by_name[name]['agreement'][key], '.3f')}",
            )
        )
    plot_scatters(panels, workdir / "agreement.png", title=f"Matched detections, {title}")

    pairs = unclear_edges(source, detections[SHOWN])
    summary = {kind: found.summary() for kind, found in pairs.items()}
    panels = [
        Scatter(
            xs=found.clear,
            ys=found.other,
            x_label="std of the clear edges of the box, pixels",
            y_label=f"std of its {kind} edges, pixels",
            title=f"{kind}: larger in {_cell(summary[kind]['share_larger'], '.0%')} of {summary[kind]['num']} boxes",
            is_ratio=True,
        )
        for kind, found in pairs.items()
    ]
    plot_scatters(panels, workdir / "hidden_edges.png", title=f"{SHOWN}, {title}")
    return summary


def _cell(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table_markdown(
    rows: Sequence[Mapping], edges: Mapping[str, Mapping], *, meta: Mapping[str, object]
) -> str:
    """Returns the tables: precision, the stds before and after, their order, what they are of, the unclear edges."""

    def cells(scores: Mapping, columns: Sequence[tuple[str, str, str]]) -> list[str]:
        return [_cell(scores.get(key), form) for key, _, form in columns]

    def headings(columns: Sequence[tuple[str, str, str]]) -> list[str]:
        return [heading for _, heading, _ in columns]

    learnt = [row for row in rows if "calibration" in row]
    precision = [
        [row["name"], row["loss"], row["suppression"], row["voting"]]
        + [_cell(row[key], ".1f") for key in ("AP", "AP50", "AP90")]
        + [_cell(row["LRP"]["oLRP"], ".1f"), _cell(row["PDQ"]["PDQ"], ".1f")]
        + [_cell(row["agreement"][key], ".3f") for key in ("score", "relative_std", "predicted_iou")]
        for row in rows
    ]
    stds = [
        [row["name"], name, *cells(row[key], SCORES), _cell(row[key]["calibration"]["ECE"], ".3f")]
        for row in learnt
        for name, key in (("raw", "uncertainty"), ("calibrated", "uncertainty_calibrated"))
    ]
    order = [
        [row["name"], *cells(row["uncertainty"]["true_std"], TRUE_STD)]
        for row in learnt
        if row["uncertainty"]["true_std"]
    ]
    temperatures = [
        [row["name"], method, *(f"{factor:.3f}" for factor in row["calibration"]["factors"][method])]
        for row in learnt
        for method in row["calibration"]["factors"]
    ]
    partition = [
        [row["name"], part, *cells(scores | {"num": scores.get("num", scores.get("num_matched"))}, PARTS)]
        for row in learnt
        for part, scores in (
            ("true positives", row["uncertainty"]),
            *(
                (name.replace("_", " "), row["uncertainty"][name])
                for name in ("duplicates", "localization_errors")
            ),
            ("false positives", row["uncertainty"]["false_positives"]),
        )
    ]
    unclear = [
        [
            kind,
            *(_cell(found[key], form) for key, form in zip(found, ("d", ".3f", ".2f", ".2f"), strict=True)),
        ]
        for kind, found in edges.items()
    ]
    labels = ("loss", "suppression", "voting")
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        "AP, optimal LRP (lower is better) and PDQ in per cent; Spearman's correlation of the score, of the mean std / "
        "side, and of an IoU head's prediction, with the IoU, over matched detections (best scores first, IoU 0.5 or "
        "more, any score):",
        markdown_table(
            (
                "name",
                *labels,
                "AP",
                "AP50",
                "AP90",
                "oLRP",
                "PDQ",
                "score, IoU",
                "std, IoU",
                "predicted IoU, IoU",
            ),
            precision,
            text_columns=labels,
        ),
        "Matched detections against the labels as annotated, stds as predicted and multiplied by the temperature of "
        "their edge. NLL of an edge in nats; share of labels within 1, 2 and 3 stds, of a Gaussian .683, .954 and "
        ".997; energy score and mean std in pixels:",
        markdown_table(("name", "stds", *headings(SCORES), "ECE"), stds, text_columns=("stds",)),
        "Order of the raw stds of matched detections against the true stds of the label noise: Spearman's "
        "correlation of std / side and of the std in pixels, beside what the box's size alone reaches; share of "
        "boxes with one clearly worst edge (1.5 times the next or more) whose largest std is that edge's, .25 by "
        "chance; predicted over true std:",
        markdown_table(("name", *headings(TRUE_STD)), order),
        "Temperature of each edge, fitted on the calibration split:",
        markdown_table(("name", "method", "x1", "y1", "x2", "y2"), temperatures, text_columns=("method",)),
        "Raw stds by what became of the detection; RMSE against the exact box, entropy in nats, spread in pixels:",
        markdown_table(
            ("name", "detections that are", *headings(PARTS)),
            partition,
            text_columns=("detections that are",),
        ),
        f"Mean raw std of hidden (half the strip or more) and of blurred (2 pixels or more) edges of {SHOWN} against "
        "that of the clear edges of the same box:",
        markdown_table(("edges", "boxes", "share larger", "median ratio", "true ratio"), unclear),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    """Trains, calibrates and evaluates what is missing, then writes the tables and figures."""
    del argv
    preset, workdir = runs.check_preset("uncertainty", "mini"), runs.workdir("uncertainty")
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
    source = Job(config=config_of(kl), workdir=Workdir(kl.workdir)).eval_source
    shown = next(row for row in rows if row["name"] == SHOWN)
    meta = {
        "preset": preset,
        "data": source.name,
        "data_fingerprint": source.fingerprint,
        "calibrated on": shown["calibration"]["data"],
        "method": shown["calibration"]["method"],
        "seed": rows[-1]["seed"],
        "steps": rows[-1]["steps"],
        "machine": runs.machine(),
        "networks": str(kl.workdir.parent),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    edges = draw(rows, source, workdir, title=f"{source.name}, seed {meta['seed']}")
    write_json(workdir / "table.json", {"rows": rows, "edges": edges, **meta})
    write_atomically(workdir / "table.md", table_markdown(rows, edges, meta=meta))
    print((workdir / "table.md").read_text())


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
