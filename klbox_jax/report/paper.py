"""Numbers of the KL Loss paper's tables (He et al., CVPR 2019), each with a mark of its source.

"read": in a public text of the authors (abstract, README, result page); "second-hand": quoted in a public report of
others; "derived": follows from such numbers; "unverified": from memory, not checked against a text. Unknown numbers are
left out.
"""

Cell = tuple[float, str]


def _unverified(**values: float) -> dict[str, Cell]:
    return {metric: (value, "unverified") for metric, value in values.items()}


# AP of VGG-16 Faster R-CNN on COCO.
PAPER_TABLE1: dict[str, Cell] = {
    "baseline": (23.6, "read"),
    "soft_nms": (24.8, "unverified"),
    "kl": (26.4, "second-hand"),
    "kl_voting": (27.8, "unverified"),
    "kl_soft_nms": (27.8, "unverified"),
    "kl_voting_soft_nms": (29.1, "read"),
}

# R50-FPN Mask R-CNN on COCO. The abstract has the gains of the last row, +1.8 in AP and +6.2 in AP90. The AP of the
# first row follows from them; that of KL Loss follows from a second-hand gain of +0.9.
PAPER_TABLE2: dict[str, dict[str, Cell]] = {
    "baseline": {"AP": (38.6, "derived")}
    | _unverified(AP50=59.8, AP60=55.3, AP70=47.7, AP80=34.4, AP90=11.3),
    "box_voting": _unverified(AP=38.9, AP50=59.8, AP60=55.5, AP70=48.1, AP80=34.8, AP90=11.9),
    "soft_nms": _unverified(AP=39.3, AP50=59.7, AP60=55.6, AP70=48.9, AP80=35.9, AP90=12.0),
    "iou_net": _unverified(AP=39.2, AP50=57.9, AP60=53.6, AP70=47.4, AP80=36.5, AP90=16.4),
    "kl": {"AP": (39.5, "derived")} | _unverified(AP50=58.9, AP60=54.4, AP70=47.6, AP80=36.0, AP90=15.8),
    "kl_voting": _unverified(AP=39.9, AP50=58.9, AP60=54.4, AP70=47.7, AP80=36.4, AP90=17.0),
    "kl_voting_soft_nms": {"AP": (40.4, "read")}
    | _unverified(AP50=58.7, AP60=54.6, AP70=48.5, AP80=37.5, AP90=17.5),
}

# R50 on COCO, by head. The first and the last baseline are from the authors' model zoo, and agree with the second-hand
# gains.
PAPER_TABLE3: dict[str, dict[str, Cell]] = {
    "conv5/baseline": {"AP": (36.5, "derived")},
    "conv5/kl": {"AP": (38.0, "derived")},
    "2mlp/baseline": {"AP": (37.9, "second-hand")},
    "2mlp/kl": {"AP": (38.5, "read")},
    "2mlp_mask/baseline": {"AP": (38.6, "derived")},
    "2mlp_mask/kl": {"AP": (39.5, "derived")},
}

# Milliseconds of an image, VGG-16 Faster R-CNN on a GTX 1080 Ti.
PAPER_TABLE4: dict[str, Cell] = {
    "baseline": (99.0, "unverified"),
    "kl_voting_soft_nms": (101.0, "unverified"),
}

# R50-FPN Faster R-CNN on COCO. The cells of KL Loss and of the last row are in the authors' README.
PAPER_TABLE5: dict[str, dict[str, Cell]] = {
    "baseline": {"AP": (37.9, "second-hand")}
    | _unverified(AP50=59.2, AP75=41.1, AP_small=21.5, AP_medium=41.1, AP_large=49.9),
    "soft_nms": _unverified(AP=38.6, AP50=59.3, AP75=42.4, AP_small=21.9, AP_medium=41.9, AP_large=50.7),
    "iou_net": {"AP": (38.1, "second-hand"), "AP50": (56.3, "second-hand")},
    "kl": {
        "AP": (38.5, "read"),
        "AP50": (57.8, "read"),
        "AP75": (41.2, "read"),
        "AP_small": (20.9, "read"),
        "AP_medium": (41.2, "read"),
        "AP_large": (51.5, "read"),
    },
    "kl_voting": {"AP": (38.8, "second-hand")},
    "kl_voting_soft_nms": {
        "AP": (39.2, "read"),
        "AP50": (57.6, "read"),
        "AP75": (42.5, "read"),
        "AP_small": (21.2, "read"),
        "AP_medium": (41.7, "read"),
        "AP_large": (52.6, "read"),
    },
}

# VOC 2007 test, trained on trainval, by backbone: mean of the average precisions at IoU 0.5.
PAPER_TABLE6: dict[str, dict[str, Cell]] = {
    "vgg_cnn_m_1024/baseline": _unverified(AP_voc=60.4),
    "vgg_cnn_m_1024/kl": _unverified(AP_voc=62.0),
    "vgg_cnn_m_1024/kl_voting": _unverified(AP_voc=62.8),
    "vgg_cnn_m_1024/kl_voting_soft_nms": _unverified(AP_voc=63.6),
    "vgg16/baseline": _unverified(AP_voc=68.7),
    "vgg16/soft_nms": _unverified(AP_voc=70.1),
    "vgg16/kl": _unverified(AP_voc=69.7),
    "vgg16/kl_voting": _unverified(AP_voc=70.2),
    "vgg16/kl_voting_soft_nms": {"AP_voc": (71.6, "read")},
}
