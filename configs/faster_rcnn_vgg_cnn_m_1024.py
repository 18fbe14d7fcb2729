"""Faster R-CNN with VGG-CNN-M-1024 on VOC 2007, under py-faster-rcnn's hyper-parameters.

    python -m klbox_jax.main --config=configs/faster_rcnn_vgg_cnn_m_1024.py:loss=kl \
        --config.data.root=path/to/VOCdevkit --config.model.init_weights=path/to/VGG_CNN_M_1024.pkl \
        --workdir=runs/vgg_cnn_m_kl --mode=train_and_eval

Paper rows: the first half of Table 6 (He et al. 2019), VOC 2007 mAP; all of them unverified: baseline 60.4, KL Loss
62.0, with voting 62.8, with soft-NMS too 63.6. Ours: not run yet. Hardware of the paper: 4 GPUs (unverified).

`batch_size` is of all devices together; the number of steps and the learning rate follow it.

From py-faster-rcnn's end-to-end training: 70k steps of 1 image, a tenth of the rate after 5/7 of them, anchors of 3
scales, RPN of 256 channels, 128 RoIs, RoIPool of 6 x 6, frozen conv1, dropout, NMS at 0.3. Ours: batches of 4, whose
rate is 4 times that of 1 (the linear rule), and what configs/faster_rcnn_vgg16.py names.
"""

import ml_collections

from configs import common, faster_rcnn_vgg16


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    variant = common.parse_arg(arg, **common.VARIANT, multi_scale=False, batch_size=4)
    config = faster_rcnn_vgg16.py_faster_rcnn(variant, data="voc", resolution=6)
    config.model.backbone = dict(name="vgg_cnn_m_1024")
    config.model.box_head = dict(name="vgg", features=(4096, 1024), dropout_rate=0.5)
    config.optimizer.learning_rate = 0.016  # 0.001 for 1 image
    config.optimizer.frozen = ("backbone/conv1",)
    common.set_schedule(config, variant, images=70_000)
    return config
