"""The tables of README.md and docs/results.md, from the numbers in docs/results.

    python -m experiments.results            # writes them anew
    python -m experiments.results --check    # ends with an error where a document says something else

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`, where NAME is a key of `TABLES`.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags

from experiments.cells import (
    Column,
    Table,
    across,
    copied,
    difference,
    gain,
    mean_and_std,
    paper_gain,
    paper_ratio,
    paper_value,
    read,
    value,
)
from experiments.methods import claims
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.files import write_atomically
from klbox_jax.report.paper import PAPER_TABLE1, PAPER_TABLE2, PAPER_TABLE3, PAPER_TABLE5
from klbox_jax.report.tables import METRICS, markdown_table

_CHECK = flags.DEFINE_bool("check", False, "Write nothing; say which document is not what the numbers say.")

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs/results.md")
MARKED = re.compile(r"<!-- table: (?P<name>[^>]*?) -->\n.*?<!-- /table -->", re.DOTALL)

FULL = "kl_voting_soft_nms"
ROWS = {
    "baseline": "smooth-L1",
    "soft_nms": "smooth-L1 + soft-NMS",
    "kl": "KL Loss",
    "kl_voting": "KL Loss + voting",
    "kl_soft_nms": "KL Loss + soft-NMS",
    FULL: "KL Loss + voting + soft-NMS",
}
FURTHER_ROWS = {
    "box_voting": "smooth-L1 + MR-CNN box voting",
    "iou_net": "IoU-Net (guided NMS + refinement)",
}
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


def labelled(*names: str) -> dict[str, str]:
    """Returns the text of each row."""
    return {name: (ROWS | FURTHER_ROWS)[name] for name in names}


def seeds_table(title: str, file: str, metrics: Sequence[str] = METRICS) -> Table:
    """Table 1 over several seeds: means and standard deviations."""
    return Table(title, ROWS, [(metric, mean_and_std(file, metric)) for metric in metrics])


def seeds_summary(title: str, file: str, metrics: Sequence[str], *further: tuple[str, Column]) -> Table:
    """Table 1 over several seeds for a reader in a hurry: a standard deviation for AP alone."""
    plain = [(metric, value(file, metric)) for metric in metrics]
    return Table(title, ROWS, [("AP", mean_and_std(file, "AP")), *plain, *further])


def differences_table(
    file: str, *, lines: Mapping = PAIRS, whole: Sequence[str], means: Sequence[str]
) -> Table:
    """Paired differences: of some metrics with their intervals, of others the mean alone."""
    columns = [
        (heading, difference(file, metric, part))
        for metric in whole
        for heading, part in ((metric, "mean"), ("over seeds", "seeds"), ("over images", "images"))
    ]
    return Table(
        "difference", lines, columns + [(metric, difference(file, metric, "mean")) for metric in means]
    )


def beyond_table(file: str) -> Table:
    """The rows beyond the paper: means and standard deviations."""
    metrics = ("AP", "AP50", "AP75", "AP80", "AP90")
    return Table("row", BEYOND_ROWS, [(metric, mean_and_std(file, metric)) for metric in metrics])


def methods_table() -> str:
    """What `experiments.methods` claims of the networks that have several seeds."""
    rows = read("methods_mini/table.json")["rows"]
    found = claims(rows, sorted({row["seed"] for row in rows}))
    headings = ("difference in AP90", "by seed", "mean", "over seeds", "all above 0")
    return markdown_table(headings, [claim.cells() for claim in found if len(claim.differences) > 1])


SCENES, AQUARIUM, OLDER = (
    f"{name}/table.json" for name in ("table1_mini_seeds", "table1_aquarium", "table1_aquarium_stride8")
)
TABLES: Mapping[str, Callable[[], str]] = {
    "scenes in short": seeds_summary(
        "embedded scenes",
        SCENES,
        ("AP50", "AP75", "AP80", "AP90"),
        ("paper's AP", paper_value(PAPER_TABLE1)),
    ),
    "Aquarium in short": seeds_summary("Aquarium, photographs", AQUARIUM, METRICS[1:]),
    "Table 1, one seed": copied("table1_mini/table.md"),
    "Table 1, five seeds": seeds_table("row", SCENES, ("AP", "AP50", "AP75", "AP80", "AP90")),
    "Table 1, differences": differences_table(SCENES, whole=("AP",), means=("AP50", "AP80", "AP90")),
    "beyond, scenes": beyond_table("beyond_mini/beyond.json"),
    "beyond, scenes, differences": differences_table(
        "beyond_mini/beyond.json", lines=BEYOND_PAIRS, whole=("AP",), means=("AP80", "AP90")
    ),
    "label noise": Table(
        "label noise",
        {
            "table1_mini_noise0/table.json": "none",
            "table1_mini/table.json": "as always",
            "table1_mini_noise2/table.json": "twice that",
        },
        [
            column
            for metric in ("AP", "AP50", "AP90")
            for column in (
                (f"baseline {metric}", across(metric, "baseline")),
                (f"full row {metric}", across(metric, FULL)),
                ("gain", lambda file, metric=metric: gain(file, metric)(FULL)),
            )
        ],
    ),
    "Aquarium": seeds_table("Aquarium, validation", AQUARIUM),
    "Aquarium, differences": differences_table(AQUARIUM, whole=("AP", "AP80"), means=("AP50", "AP90")),
    "Aquarium, by seed": Table(
        "difference",
        PAIRS,
        [(f"{metric}, by seed", difference(AQUARIUM, metric, "by_seed")) for metric in ("AP", "AP80")],
    ),
    "beyond, Aquarium": beyond_table("beyond_aquarium/beyond.json"),
    "beyond, Aquarium, differences": differences_table(
        "beyond_aquarium/beyond.json", lines=BEYOND_PAIRS, whole=("AP",), means=("AP80", "AP90")
    ),
    "Aquarium, stride 8": seeds_table("Aquarium, validation", OLDER),
    "Aquarium, stride 8, differences": differences_table(OLDER, whole=("AP", "AP80"), means=("AP90",)),
    "beyond, stride 8": differences_table(
        "beyond_aquarium_stride8/beyond.json",
        lines={pair: text for pair, text in BEYOND_PAIRS.items() if pair[1] == FULL},
        whole=("AP",),
        means=(),
    ),
    "methods": methods_table,
    "Tables 5 and 6": Table(
        "row",
        labelled("baseline", "soft_nms", "iou_net", "kl", "kl_voting", FULL),
        [
            *((metric, value("table5_mini/table.json", metric)) for metric in ("AP", "AP50", "AP75", "AP90")),
            ("AP_voc", value("table6_mini/table.json", "AP_voc")),
            ("gain in AP", gain("table5_mini/table.json", "AP")),
            ("paper's gain, Table 5", paper_gain(PAPER_TABLE5)),
        ],
    ),
    "Table 2": Table(
        "Table 2",
        labelled("baseline", "box_voting", "soft_nms", "iou_net", "kl", "kl_voting", FULL),
        [
            *((metric, value("table2_mini/table.json", metric)) for metric in ("AP", "AP50", "AP80", "AP90")),
            ("mask AP", value("table2_mini/table.json", "mask_AP")),
            ("gain in AP", gain("table2_mini/table.json", "AP")),
            ("paper's gain", paper_gain(PAPER_TABLE2)),
        ],
    ),
    "Table 3": Table(
        "Table 3: KL Loss over smooth-L1, hard NMS",
        {
            "conv5/kl": "two layers on one level, for the conv5 head",
            "2mlp/kl": "two layers on three levels",
            "2mlp_mask/kl": "the same with a mask head",
        },
        [
            *((metric, gain("table3_mini/table.json", metric)) for metric in ("AP", "AP90")),
            ("paper's AP", paper_gain(PAPER_TABLE3)),
        ],
    ),
    "Table 4": Table(
        "row",
        {
            "baseline": "smooth-L1, hard NMS",
            "kl_voting": "KL Loss, hard NMS + voting",
            FULL: "KL Loss, soft-NMS + voting",
        },
        [
            ("ms an image", value("table4_mini/table.json", "ms", ".2f")),
            ("ratio", value("table4_mini/table.json", "ratio", ".3f")),
            ("paper's ratio", paper_ratio),
        ],
    ),
}


def fill(text: str) -> str:
    """Returns a document with its marked tables made anew.

    Raises:
        ValueError: there is no table of a name.
    """

    def table(found: re.Match) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"no table is named {name!r}; there are {sorted(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- /table -->"

    return MARKED.sub(table, text)


def main(argv: list[str]) -> None:
    """Writes the documents, or checks them."""
    del argv
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        filled = fill(text)
        if filled == text:
            continue
        if _CHECK.value:
            raise ValueError(f"{document} is not what docs/results says; run python -m experiments.results")
        write_atomically(document, filled)
        print(document)


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
