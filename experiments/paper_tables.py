"""Tables 2 to 6 of He et al. 2019, with our rows next to the paper's numbers.

    python -m experiments.paper_tables --table=2 --preset=mini
    python -m experiments.paper_tables --table=5 --preset=full --data_root=COCO_FOLDER --init_weights=R-50.pkl
    python -m experiments.paper_tables --table=6 --preset=full --data_root=VOCDEVKIT --init_weights=VGG16.pkl \
        --init_weights_vgg_cnn_m_1024=VGG_CNN_M_1024.pkl

Table 2 compares other ways to better boxes on Mask R-CNN: box voting, soft-NMS, IoU-Net (IoU-guided NMS and
refinement). The paper's numbers are of boxes; ours have masks too. Table 3 compares heads, each with smooth-L1 and with
KL Loss under hard NMS. Table 4 is the time of inference (`experiments/inference_time.py`). Table 5 compares soft-NMS,
IoU-Net and KL Loss on Faster R-CNN. Table 6 is VOC 2007 with two backbones; `AP_voc` is VOC 2007's mean of the average
precisions at IoU 0.5 by eleven points, the other columns are COCO's. The paper's rows of QUBO, another suppression, are
left out.

`--preset=mini` replaces the paper's detectors by small ones on the scenes, as each table's notes say. Networks are
shared between the tables (`experiments/networks.py`). Finished work is skipped, interrupted work is resumed.
`--dry_run` prints the data, the commands and estimates of the trainings.

    table.md, table.json      our rows, with the paper's numbers
"""

import dataclasses
import time
from collections.abc import Mapping

from absl import flags

from experiments import inference_time, networks, runs
from experiments.networks import Network
from experiments.runs import BASELINE, BOX_VOTING, IOU_NET, KL, KL_VOTING, KL_VOTING_SOFT_NMS, SOFT_NMS, Row
from klbox_jax import cli
from klbox_jax.report import paper
from klbox_jax.report.tables import METRICS, PaperNumbers, paper_table_markdown

_TABLE = flags.DEFINE_enum("table", None, ["2", "3", "4", "5", "6"], "Table of the paper.")


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    name: str  # of the table, such as `table2`
    # by preset, the network family (a key of `networks.FAMILIES`) by the name of the head or backbone that precedes
    # the names of its rows; "" for a table of one family.
    heads: Mapping[str, Mapping[str, str]]
    rows: tuple[Row, ...]  # of every head
    paper: Mapping[str, Mapping[str, paper.Cell]]  # the paper's numbers
    setting: str  # detector and data of the paper's numbers
    mini: str  # the detectors that replace the paper's at `--preset=mini`, for the notes
    metrics: tuple[str, ...] = METRICS  # columns of ours
    # metrics for which the paper's value and gain are printed next to our gains.
    headlines: tuple[str, ...] = ("AP",)
    voc: bool = False  # evaluate by VOC 2007's protocol too

    def networks(self, preset: str) -> dict[tuple[str, Network], tuple[Row, ...]]:
        """Returns the rows of each head and network, in the order of the table."""
        return {
            (head, Network(family, loss)): tuple(row for row in self.rows if row.loss == loss)
            for head, family in self.heads[preset].items()
            for loss in dict.fromkeys(row.loss for row in self.rows)
        }


TABLES = {
    "2": PaperTable(
        name="table2",
        heads={"mini": {"": "mask"}, "full": {"": "mask_resnet50_fpn"}},
        rows=(BASELINE, BOX_VOTING, SOFT_NMS, IOU_NET, KL, KL_VOTING, KL_VOTING_SOFT_NMS),
        paper=paper.PAPER_TABLE2,
        setting="R50-FPN Mask R-CNN on COCO",
        mini="a small ResNet-FPN with a mask head, box head on three levels, stands for R50-FPN Mask R-CNN",
        metrics=("AP", "AP50", "AP60", "AP70", "AP80", "AP90", "mask_AP", "mask_AP50", "mask_AP75"),
        headlines=("AP", "AP90"),
    ),
    # The paper's conv5 head is the last stage of R50-C4. The miniature has no convolutional head: its first row differs
    # from the second only in the level of the RoIs.
    "3": PaperTable(
        name="table3",
        heads={
            "mini": {"conv5": "one_level", "2mlp": "pyramid", "2mlp_mask": "mask"},
            "full": {"conv5": "resnet50_c4", "2mlp": "resnet50_fpn", "2mlp_mask": "mask_resnet50_fpn"},
        },
        rows=(BASELINE, KL),
        paper=paper.PAPER_TABLE3,
        setting="R50 with the head named, on COCO",
        mini="conv5: two layers on one level; 2mlp: on three levels; 2mlp_mask: on three levels, with a mask head",
    ),
    "5": PaperTable(
        name="table5",
        heads={"mini": {"": "one_level"}, "full": {"": "resnet50_fpn"}},
        rows=(BASELINE, SOFT_NMS, IOU_NET, KL, KL_VOTING, KL_VOTING_SOFT_NMS),
        paper=paper.PAPER_TABLE5,
        setting="R50-FPN Faster R-CNN on COCO",
        mini="a small ResNet-FPN, box head on one level, stands for R50-FPN",
        metrics=("AP", "AP50", "AP75", "AP90", "AP_small", "AP_medium", "AP_large"),
    ),
    "6": PaperTable(
        name="table6",
        heads={
            "mini": {"": "one_level"},
            "full": {"vgg_cnn_m_1024": "vgg_cnn_m_1024_voc", "vgg16": "vgg16_voc"},
        },
        rows=(BASELINE, SOFT_NMS, KL, KL_VOTING, KL_VOTING_SOFT_NMS),
        paper=paper.PAPER_TABLE6,
        setting="Faster R-CNN with the backbone named, on VOC 2007",
        mini="a small ResNet-FPN on the scenes stands for both backbones",
        metrics=("AP_voc", "AP", "AP50", "AP75", "AP90"),
        headlines=("AP_voc",),
        voc=True,
    ),
}


def run_table(table: PaperTable) -> None:
    """Trains and evaluates what is missing of a table, and writes the table after each network."""
    started = time.perf_counter()
    preset, workdir = runs.check_preset(table.name, "mini", "full"), runs.workdir(table.name)
    wanted = table.networks(preset)
    if runs.DRY_RUN.value:
        print(networks.plan(table.name, [network for _, network in wanted]))
        return
    rows: list[dict] = []
    for (head, network), of_network in wanted.items():
        for entry in networks.train_and_evaluate(network, of_network, voc=table.voc):
            rows.append(entry | {"name": f"{head}/{entry['name']}" if head else entry["name"]})
        meta = runs.meta_of(rows[0]) | {"networks": str(network.workdir.parent)}
        if preset == "mini":
            meta["in miniature"] = table.mini
        numbers = PaperNumbers(
            cells=table.paper,
            setting=table.setting,
            comparable=preset == "full",
            headlines=table.headlines,
            print_all=True,
        )
        text = paper_table_markdown(rows, numbers, meta=meta, metrics=table.metrics)
        runs.write_result(workdir, {"rows": rows, **meta}, text)
    print(text)
    print(f"{time.perf_counter() - started:.0f} seconds. Table in {workdir}, networks in {meta['networks']}.")


def main(_: list[str]) -> None:
    """Runs what is missing of the table that `--table` names, then writes it."""
    if _TABLE.value is None:
        raise ValueError("name a table of the paper: --table=2, 3, 4, 5 or 6")
    if _TABLE.value == "4":
        inference_time.run_table4()
    else:
        run_table(TABLES[_TABLE.value])


if __name__ == "__main__":
    cli.start(main)
