"""Mask R-CNN with ResNet-50-FPN or ResNet-101-FPN on COCO, under Detectron's hyper-parameters.

    python -m klbox_jax.main --config=configs/mask_rcnn_resnet50_fpn.py:loss=kl,schedule=2x,init=detector \
        --config.data.root=path/to/coco --config.model.init_weights=path/to/model_final.pkl \
        --workdir=runs/mask_r50_fpn_kl --mode=train_and_eval

Paper row: R50-FPN Mask R-CNN (He et al. 2019, table 2), box AP on COCO val2017. Baseline 38.6 (Detectron's model zoo);
KL Loss, variance voting and soft-NMS 40.4 (a public result listing). In the abstract: +1.8 AP and +6.2 AP90. The rows
between, 39.5 with KL Loss and 39.9 with voting, are unverified. Ours: not run yet. Hardware: 8 GPUs of 2 images.

Variants and choices are those of configs/faster_rcnn_resnet50_fpn.py, `init=detector` included: its file is then
Detectron's Mask R-CNN of the 2x schedule. The mask head is Detectron's: RoIAlign of 14 x 14, four convolutions and a
deconvolution, 28 x 28 masks. Ours: an object's mask is kept as 112 x 112 cells of its box.
"""

import ml_collections

from configs import faster_rcnn_resnet50_fpn


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return faster_rcnn_resnet50_fpn.resnet_fpn(arg, masks=True)
