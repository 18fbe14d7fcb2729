r"""Table 6 of He et al. 2019: VOC 2007, with VGG-CNN-M-1024 and with VGG-16.

    python -m experiments.table6 --preset=mini
    python -m experiments.table6 --preset=full --data_root=VOCDEVKIT --init_weights=VGG16.pkl \
        --init_weights_vgg_cnn_m_1024=VGG_CNN_M_1024.pkl

Two networks for each backbone make five rows. `AP_voc` is VOC 2007's mean of the average precisions at IoU 0.5, by
eleven points; the other columns are COCO's. The paper's rows of QUBO, another suppression, are left out. In miniature
one small ResNet-FPN on the scenes stands for both backbones. See `experiments/tables.py` for the files.
"""

from absl import app

from experiments import rows, tables
from klbox_jax.cli import parse_flags, report_user_errors, set_up_logging
from klbox_jax.report.paper import PAPER_TABLE6

TABLE = tables.PaperTable(
    name="table6",
    heads={
        "mini": {"": "one_level"},
        "full": {"vgg_cnn_m_1024": "vgg_cnn_m_1024_voc", "vgg16": "vgg16_voc"},
    },
    rows=(rows.BASELINE, rows.SOFT_NMS, rows.KL, rows.KL_VOTING, rows.KL_VOTING_SOFT_NMS),
    paper=PAPER_TABLE6,
    setting="Faster R-CNN with the backbone named, on VOC 2007",
    mini="a small ResNet-FPN on the scenes stands for both backbones",
    metrics=("AP_voc", "AP", "AP50", "AP75", "AP90"),
    headlines=("AP_voc",),
    voc=True,
)


def main(argv: list[str]) -> None:
    """Runs what is missing of the table, then writes it."""
    del argv
    tables.run_table(TABLE)


if __name__ == "__main__":
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
