"""Table 3 of He et al. 2019: what KL Loss adds on different heads of Fast R-CNN.

    python -m experiments.table3 --preset=mini
    python -m experiments.table3 --preset=full --data_root=COCO_FOLDER --init_weights=R-50.pkl

Two networks for each head, one with smooth-L1 and one with KL Loss, both under hard NMS without voting:

    head        the paper's, and --preset=full                 --preset=mini
    conv5       R50-C4, the last stage of the network          two layers on RoIs cut out of one level
    2mlp        R50-FPN, two layers                            two layers on RoIs cut out of three levels
    2mlp_mask   R50-FPN, two layers and a mask head            the same with a mask head

So the miniature has no convolutional head: its first row differs from the second in the level of the RoIs alone. See
`experiments/tables.py` for the files.
"""

from absl import app

from experiments import rows, tables
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.report.paper import PAPER_TABLE3

TABLE = tables.PaperTable(
    name="table3",
    heads={
        "mini": {"conv5": "one_level", "2mlp": "pyramid", "2mlp_mask": "mask"},
        "full": {"conv5": "resnet50_c4", "2mlp": "resnet50_fpn", "2mlp_mask": "mask_resnet50_fpn"},
    },
    rows=(rows.BASELINE, rows.KL),
    paper=PAPER_TABLE3,
    setting="R50 with the head named, on COCO",
    mini="conv5: two layers on one level; 2mlp: on three levels; 2mlp_mask: on three levels, with a mask head",
)


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    tables.run_table(TABLE)


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
