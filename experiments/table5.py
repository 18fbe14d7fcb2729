"""Table 5 of He et al. 2019: R50-FPN Faster R-CNN with soft-NMS, with IoU-Net, and with KL Loss.

    python -m experiments.table5 --preset=mini
    python -m experiments.table5 --preset=full --data_root=COCO_FOLDER --init_weights=R-50.pkl

Three networks make six rows; `experiments/tables.py` has the files. In miniature the detector is the small one of the
scenes, and the networks are those of Table 1, which can lend them.
"""

from absl import app

from experiments import rows, tables
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.report.paper import PAPER_TABLE5

TABLE = tables.PaperTable(
    name="table5",
    heads={"mini": {"": "one_level"}, "full": {"": "resnet50_fpn"}},
    rows=(
        rows.BASELINE,
        rows.SOFT_NMS,
        rows.IOU_NET,
        rows.KL,
        rows.KL_VOTING,
        rows.KL_VOTING_SOFT_NMS,
    ),
    paper=PAPER_TABLE5,
    setting="R50-FPN Faster R-CNN on COCO",
    mini="a small ResNet-FPN, box head on one level, stands for R50-FPN",
    metrics=("AP", "AP50", "AP75", "AP90", "AP_small", "AP_medium", "AP_large"),
)


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    tables.run_table(TABLE)


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
