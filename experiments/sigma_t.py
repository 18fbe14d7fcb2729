"""The figure of He et al. 2019 on sigma_t: what the width of voting's IoU weight does to AP at each IoU.

    python -m experiments.sigma_t --preset=mini
    python -m experiments.sigma_t --preset=mini --run_workdir=runs/table1_mini/kl
    python -m experiments.sigma_t --preset=full --data_root=COCO_FOLDER --init_weights=R-50.pkl

One network with KL Loss under hard NMS, without voting and with variance voting under each sigma_t, all from one
forward pass. The network is that of Table 5 (`experiments/networks.py`), trained where it is missing, or any
finished run with variances that `--run_workdir` names; what is evaluated already is not evaluated again.

    table.md, table.json      the metrics at every sigma_t
    sigma_t.png               the same as curves

The paper's curves are not known in numbers; as remembered, AP50 hardly moves, and 0.02, between a usable 0.005 and
0.05, is what it takes throughout.
"""

import pathlib
from collections.abc import Sequence

import ml_collections
from absl import app, flags

from experiments import networks, runs
from experiments.networks import Network
from experiments.rows import Row
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.files import read_json, write_atomically, write_json
from klbox_jax.report.plots import plot_ap_over_sigma_t
from klbox_jax.report.tables import markdown_table
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


def finished_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config that a run was started with.

    Raises:
        ValueError: there is none.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise ValueError(
            f"--run_workdir={workdir}: there is no config.json; name the folder of a finished run"
        )

    def tuples(value):
        # A config has tuples, which JSON knows not.
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ml_collections.ConfigDict(tuples(read_json(file))).lock()


def evaluate(preset: str) -> list[dict]:
    """Returns the metrics of every row, with its `sigma_t`, doing what is not yet done."""
    if _RUN_WORKDIR.value:
        workdir = pathlib.Path(_RUN_WORKDIR.value)
        config = finished_config(workdir)
        step, _ = restore_params(Workdir(workdir).checkpoints)
        metrics = runs.evaluate_rows(config, workdir, step, ROWS)
        entries = [row.labels() | {"steps": step} | metrics[row.name] for row in ROWS]
    else:
        entries = networks.train_and_evaluate(Network(FAMILIES[preset], "kl"), ROWS)
    return [
        entry | {"sigma_t": row.settings.get("sigma_t")} for entry, row in zip(entries, ROWS, strict=True)
    ]


def write_results(rows: Sequence[dict], workdir: pathlib.Path, *, meta: dict[str, object]) -> None:
    """Writes table.md, table.json and sigma_t.png."""

    def cells(row: dict) -> list[str]:
        head = "no voting" if row["sigma_t"] is None else f"{row['sigma_t']:g}"
        return [head, *("-" if row[key] is None else f"{row[key]:.2f}" for key in METRICS)]

    parts = [
        "\n".join(f"- {key}: {value}" for key, value in meta.items()),
        "Average precision in per cent, variance voting under hard NMS:",
        markdown_table(("sigma_t", *METRICS), [cells(row) for row in rows]),
        f"The paper takes {PAPER_SIGMA_T:g} (from memory), the code of its authors 0.01 (read).",
    ]
    write_json(workdir / "table.json", {"rows": list(rows), **meta})
    write_atomically(workdir / "table.md", "\n\n".join(parts) + "\n")
    plot_ap_over_sigma_t(
        rows,
        workdir / "sigma_t.png",
        metrics=CURVES,
        title=f"Voting's sigma_t, {meta['data']}, seed {rows[0]['seed']}",
        paper=PAPER_SIGMA_T,
    )


def main(argv: list[str]) -> None:
    """Evaluates what is missing, then writes the table and the figure."""
    del argv
    preset, workdir = runs.check_preset("sigma_t", *FAMILIES), runs.workdir("sigma_t")
    if runs.DRY_RUN.value:
        trained = [] if _RUN_WORKDIR.value else [Network(FAMILIES[preset], "kl")]
        print(networks.plan("sigma_t", trained))
        return
    rows = evaluate(preset)
    meta = {
        "preset": preset,
        "data": rows[0]["data"],
        "data_fingerprint": rows[0]["data_fingerprint"],
        "steps": rows[0]["steps"],
        "seed": rows[0]["seed"],
        "machine": runs.machine(),
    }
    write_results(rows, workdir, meta=meta)
    print((workdir / "table.md").read_text())


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
