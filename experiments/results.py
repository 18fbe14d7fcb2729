"""Fills the tables of README.md, docs/results.md and docs/intervals.md from docs/results.

    python -m experiments.results                                  # writes the tables
    python -m experiments.results --check                          # fails if a table is out of date
    python -m experiments.results --store=runs/table1_blood_cells  # first adds docs/results/table1_blood_cells.json

`TABLES` has the tables by the names that the documents use (`klbox_jax/report/documents.py`).
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from experiments import interval_tables
from experiments.methods import claim_cells, claims
from experiments.stored_results import (
    RESULTS,
    Cells,
    difference,
    gain,
    mean_and_std,
    paper_gain,
    paper_value,
    read,
    store,
    table_of,
    value,
)
from klbox_jax import cli
from klbox_jax.report import documents
from klbox_jax.report.paper import PAPER_TABLE1, PAPER_TABLE2, PAPER_TABLE3, PAPER_TABLE4, PAPER_TABLE5
from klbox_jax.report.tables import METRICS, markdown_table, table1_markdown

_CHECK = flags.DEFINE_bool("check", False, "Write nothing; fail if a document is out of date.")
_STORE = flags.DEFINE_string("store", "", "Workdir of a finished experiment, to be stored in docs/results.")

DOCUMENTS = (
    RESULTS.parents[1] / "README.md",
    RESULTS.parent / "results.md",
    RESULTS.parent / "intervals.md",
)

FULL = "kl_voting_soft_nms"
ROWS = {
    "baseline": "smooth-L1",
    "soft_nms": "smooth-L1 + soft-NMS",
    "kl": "KL Loss",
    "kl_voting": "KL Loss + voting",
    "kl_soft_nms": "KL Loss + soft-NMS",
    FULL: "KL Loss + voting + soft-NMS",
}
FURTHER_ROWS = {"box_voting": "smooth-L1 + MR-CNN box voting", "iou_net": "IoU-Net (guided NMS + refinement)"}
PAIRS = {
    ("soft_nms", "baseline"): "soft-NMS",
    ("kl", "baseline"): "KL Loss",
    ("kl_voting", "kl"): "voting, over KL Loss",
    (FULL, "kl_soft_nms"): "voting, over KL Loss + soft-NMS",
    (FULL, "baseline"): "everything, over smooth-L1",
}
BEYOND_ROWS = {
    FULL: "the paper's best row",
    "ours": "`ours`",
    "flip": "the paper's best row, mirrored too",
    "ours_flip": "`ours_flip`",
}
BEYOND_PAIRS = {
    ("ours", FULL): "`ours`, over the paper's best row",
    ("ours_flip", FULL): "`ours_flip`, over the paper's best row",
    ("ours_flip", "flip"): "`ours_flip`, over the paper's best row, mirrored too",
}
HEADS = {
    "conv5/kl": "two layers on one level, for the conv5 head",
    "2mlp/kl": "two layers on three levels",
    "2mlp_mask/kl": "the same with a mask head",
}
TIMED_ROWS = {
    "baseline": "smooth-L1, hard NMS",
    "kl_voting": "KL Loss, hard NMS + voting",
    FULL: "KL Loss, soft-NMS + voting",
}
SCENES, AQUARIUM, ATTEMPTS = "table1_mini_seeds", "table1_aquarium", "aquarium_attempts"


def labelled(*names: str) -> dict[str, str]:
    """Returns the text of each row."""
    return {name: (ROWS | FURTHER_ROWS)[name] for name in names}


def by_metric(cells: Callable[..., Cells], result: str, *metrics: str) -> dict[str, Cells]:
    """Returns the cells of each metric of a result, by its name."""
    return {metric: cells(result, metric) for metric in metrics}


def seeds_table(title: str, result: str, *metrics: str, rows: Mapping = ROWS) -> Callable[[], str]:
    """Returns a table of rows over several seeds: means and standard deviations."""
    return table_of(title, rows, by_metric(mean_and_std, result, *metrics))


def differences_table(
    result: str, *, pairs: Mapping = PAIRS, whole: Sequence[str], means: Sequence[str] = ()
) -> Callable[[], str]:
    """Returns a table of paired differences: of some metrics with their intervals, of others only the mean."""
    columns = [
        (heading, difference(result, metric, part))
        for metric in whole
        for heading, part in ((metric, "mean"), ("over seeds", "seeds"), ("over images", "images"))
    ]
    return table_of("difference", pairs, [*columns, *((m, difference(result, m, "mean")) for m in means)])


def one_seed() -> str:
    """Returns the whole of Table 1 on the scenes as its program writes it."""
    result = read("table1_mini")
    meta = {key: result[key] for key in ("preset", "data", "data_fingerprint", "machine")}
    return table1_markdown(result["rows"], meta=meta).strip()


def noise_table() -> str:
    """Returns the baseline and the full row under each label noise."""
    columns = []
    for metric in ("AP", "AP50", "AP90"):
        columns += [
            (f"baseline {metric}", lambda name, metric=metric: value(name, metric)("baseline")),
            (f"full row {metric}", lambda name, metric=metric: value(name, metric)(FULL)),
            ("gain", lambda name, metric=metric: gain(name, metric)(FULL)),
        ]
    lines = {"table1_mini_noise0": "none", "table1_mini": "as always", "table1_mini_noise2": "twice that"}
    return table_of("label noise", lines, columns)()


def attempts_table() -> str:
    """Returns the rows of each attempt on Aquarium, and the gain of the full row."""
    columns = [
        (f"{text}, AP", lambda name, row=row: value(ATTEMPTS, "AP")(f"{name}/{row}"))
        for row, text in labelled("baseline", "soft_nms", "kl", FULL).items()
    ]
    columns += [
        (f"gain in {metric}", lambda name, metric=metric: gain(ATTEMPTS, metric)(f"{name}/{FULL}"))
        for metric in ("AP", "AP50", "AP80", "AP90")
    ]
    attempts = {one["name"]: one["text"] for one in read(ATTEMPTS)["attempts"]}
    return table_of("attempt", attempts, columns)()


def methods_table() -> str:
    """Returns the differences of `experiments.methods` for the networks that have several seeds."""
    rows = read("methods_mini")["rows"]
    found = claims(rows, sorted({row["seed"] for row in rows}))
    headings = ("difference in AP90", "by seed", "mean", "over seeds", "all above 0")
    return markdown_table(headings, [claim_cells(*claim) for claim in found.items() if len(claim[1]) > 1])


BEYOND_METRICS = ("AP", "AP50", "AP75", "AP80", "AP90")
TABLES: documents.Tables = {
    "scenes in short": table_of(
        "embedded scenes",
        ROWS,
        {
            "AP": mean_and_std(SCENES, "AP"),
            **by_metric(value, SCENES, "AP50", "AP75", "AP80", "AP90"),
            "paper's AP": paper_value(PAPER_TABLE1),
        },
    ),
    "Table 1, one seed": one_seed,
    "Table 1, five seeds": seeds_table("row", SCENES, "AP", "AP50", "AP75", "AP80", "AP90"),
    "Table 1, differences": differences_table(SCENES, whole=("AP",), means=("AP50", "AP80", "AP90")),
    "beyond, scenes": seeds_table("row", "beyond_mini", *BEYOND_METRICS, rows=BEYOND_ROWS),
    "beyond, scenes, differences": differences_table(
        "beyond_mini", pairs=BEYOND_PAIRS, whole=("AP",), means=("AP80", "AP90")
    ),
    "label noise": noise_table,
    "Aquarium": seeds_table("Aquarium, validation", AQUARIUM, *METRICS),
    "Aquarium, differences": differences_table(AQUARIUM, whole=("AP", "AP80"), means=("AP50", "AP90")),
    "Aquarium, by seed": table_of(
        "difference",
        PAIRS,
        {f"{metric}, by seed": difference(AQUARIUM, metric, "by_seed") for metric in ("AP", "AP80")},
    ),
    "beyond, Aquarium": seeds_table("row", "beyond_aquarium", *BEYOND_METRICS, rows=BEYOND_ROWS),
    "beyond, Aquarium, differences": differences_table(
        "beyond_aquarium", pairs=BEYOND_PAIRS, whole=("AP",), means=("AP80", "AP90")
    ),
    "Aquarium, attempts": attempts_table,
    "methods": methods_table,
    "Tables 5 and 6": table_of(
        "row",
        labelled("baseline", "soft_nms", "iou_net", "kl", "kl_voting", FULL),
        {
            **by_metric(value, "table5_mini", "AP", "AP50", "AP75", "AP90"),
            "AP_voc": value("table6_mini", "AP_voc"),
            "gain in AP": gain("table5_mini", "AP"),
            "paper's gain, Table 5": paper_gain(PAPER_TABLE5),
        },
    ),
    "Table 2": table_of(
        "Table 2",
        labelled("baseline", "box_voting", "soft_nms", "iou_net", "kl", "kl_voting", FULL),
        {
            **by_metric(value, "table2_mini", "AP", "AP50", "AP80", "AP90"),
            "mask AP": value("table2_mini", "mask_AP"),
            "gain in AP": gain("table2_mini", "AP"),
            "paper's gain": paper_gain(PAPER_TABLE2),
        },
    ),
    "Table 3": table_of(
        "Table 3: KL Loss over smooth-L1, hard NMS",
        HEADS,
        {**by_metric(gain, "table3_mini", "AP", "AP90"), "paper's AP": paper_gain(PAPER_TABLE3)},
    ),
    "Table 4": table_of(
        "row",
        TIMED_ROWS,
        {
            "ms an image": value("table4_mini", "ms", ".2f"),
            "ratio": value("table4_mini", "ratio", ".3f"),
            "paper's ratio": paper_value(PAPER_TABLE4, ".2f", over="baseline"),
        },
    ),
    **interval_tables.TABLES,
}


def main(_: list[str]) -> None:
    """Writes the documents, or checks them."""
    if _STORE.value:
        workdir = pathlib.Path(_STORE.value)
        print(store(workdir, workdir.name))
    command = "python -m experiments.results"
    for document in documents.update(DOCUMENTS, TABLES, check=_CHECK.value, command=command):
        print(document)


if __name__ == "__main__":
    cli.start(main)
