"""The sigma_t figure of He et al. 2019: AP at each IoU over the width of voting's IoU weight.

    python -m experiments.sigma_t --preset=mini
    python -m experiments.sigma_t --preset=mini --run_workdir=runs/table1_mini/kl
    python -m experiments.sigma_t --preset=full --data_root=COCO_FOLDER --init_weights=R-50.pkl

One network with KL Loss under hard NMS, without voting and with variance voting under each sigma_t, all from one
forward pass. The network is that of Table 5 (`experiments/networks.py`), trained where it is missing, or any finished
run with variances that `--run_workdir` names. Finished evaluations are skipped.

    table.md, table.json      the metrics at every sigma_t
    sigma_t.png               the same as curves

The paper's curves are not known in numbers; from memory, AP50 hardly moves, 0.005 to 0.05 are usable, and the paper
uses 0.02 throughout.
"""

from absl import flags

from experiments import networks, runs
from experiments.networks import Network
from experiments.runs import Row
from klbox_jax import cli
from klbox_jax.report import columns
from klbox_jax.report.columns import Column, number
from klbox_jax.report.plots import plot_ap_over_sigma_t
from klbox_jax.serving.model_folder import read_config
from klbox_jax.train.checkpoints import restore_params
from klbox_jax.train.workdir import Workdir

_RUN_WORKDIR = flags.DEFINE_string("run_workdir", "", "A finished run whose newest checkpoint to use.")

FAMILIES = {"mini": "one_level", "full": "resnet50_fpn"}
SIGMA_TS = (0.0025, 0.0035, 0.005, 0.007, 0.01, 0.014, 0.02, 0.03, 0.05, 0.07, 0.1)
PAPER_SIGMA_T = 0.02
METRICS = ("AP", "AP50", "AP75", "AP80", "AP90")
CURVES = METRICS[1:]
ROWS = (
    Row("no_voting", "kl", "hard", "none"),
    *(Row(f"sigma_t_{sigma_t:g}", "kl", "hard", "variance", {"sigma_t": sigma_t}) for sigma_t in SIGMA_TS),
)


def evaluate(preset: str) -> list[dict]:
    """Returns the metrics of every row, with its `sigma_t`; trains and evaluates only what is missing."""
    if _RUN_WORKDIR.value:
        workdir = Workdir(_RUN_WORKDIR.value)
        config = read_config(workdir).lock()
        step, _ = restore_params(workdir.checkpoints)
        metrics = runs.evaluate_rows(config, workdir.path, step, ROWS)
        entries = [row.labels() | {"steps": step} | metrics[row.name] for row in ROWS]
    else:
        entries = networks.train_and_evaluate(Network(FAMILIES[preset], "kl"), ROWS)
    return [
        entry | {"sigma_t": row.settings.get("sigma_t")} for entry, row in zip(entries, ROWS, strict=True)
    ]


def main(_: list[str]) -> None:
    """Evaluates what is missing, then writes the table and the figure."""
    preset, workdir = runs.check_preset("sigma_t", *FAMILIES), runs.workdir("sigma_t")
    if runs.DRY_RUN.value:
        trained = [] if _RUN_WORKDIR.value else [Network(FAMILIES[preset], "kl")]
        print(networks.plan("sigma_t", trained))
        return
    rows = evaluate(preset)
    meta = runs.meta_of(rows[0]) | {"steps": rows[0]["steps"], "seed": rows[0]["seed"]}
    head = Column("sigma_t", lambda row: "no voting" if row["sigma_t"] is None else f"{row['sigma_t']:g}")
    text = columns.page(
        columns.listing(meta),
        "Average precision in per cent, variance voting under hard NMS:",
        columns.table([head, *(number(metric, ".2f") for metric in METRICS)], rows),
        f"The paper takes {PAPER_SIGMA_T:g} (from memory), the code of its authors 0.01 (read).",
    )
    runs.write_result(workdir, {"rows": rows, **meta}, text)
    plot_ap_over_sigma_t(
        rows,
        workdir / "sigma_t.png",
        metrics=CURVES,
        title=f"Voting's sigma_t, {meta['data']}, seed {meta['seed']}",
        paper=PAPER_SIGMA_T,
    )
    print(text)


if __name__ == "__main__":
    cli.start(main)
