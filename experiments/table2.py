"""Table 2 of He et al. 2019: other ways to better boxes, beside KL Loss, on R50-FPN Mask R-CNN.

    python -m experiments.table2 --preset=mini
    python -m experiments.table2 --preset=full --data_root=COCO_FOLDER --init_weights=R-50.pkl

Three networks make seven rows: smooth-L1 under hard NMS, under the box voting of MR-CNN and under soft-NMS; smooth-L1
with an IoU head under IoU-guided NMS and refinement; and KL Loss without voting, with it, and with soft-NMS too. The
paper's numbers are of boxes. Those of our masks stand beside them.

In miniature the detector is the small one of the scenes with a pyramid under its box head and a mask head. See
`experiments/tables.py` for the files.
"""

from absl import app

from experiments import rows, tables
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.report.paper import PAPER_TABLE2

TABLE = tables.PaperTable(
    name="table2",
    heads={"mini": {"": "mask"}, "full": {"": "mask_resnet50_fpn"}},
    rows=(
        rows.BASELINE,
        rows.BOX_VOTING,
        rows.SOFT_NMS,
        rows.IOU_NET,
        rows.KL,
        rows.KL_VOTING,
        rows.KL_VOTING_SOFT_NMS,
    ),
    paper=PAPER_TABLE2,
    setting="R50-FPN Mask R-CNN on COCO",
    mini="a small ResNet-FPN with a mask head, box head on three levels, stands for R50-FPN Mask R-CNN",
    metrics=("AP", "AP50", "AP60", "AP70", "AP80", "AP90", "mask_AP", "mask_AP50", "mask_AP75"),
    headlines=("AP", "AP90"),
)


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    tables.run_table(TABLE)


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
