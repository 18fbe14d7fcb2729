"""The helpers with which a family writes its differences from the fields of configs/base.py.

A family's `get_config` starts from `base()` and changes what its paper says differently. Variants are named on the
command line: `--config=scenes:loss=kl,voting=variance`.
"""

import ml_collections

# Families and users' files read these names from here.
from configs.base import BASE, CANVASES, EXTRA_FIELDS, FROZEN  # noqa: F401

# Variants of every family. An empty `voting` is variance for a loss with variances, and none for another.
VARIANT = dict(loss="kl", suppression="soft_gaussian", voting="", iou_head=False)
# Further variants of the families that start from a ResNet of Detectron.
RESNET_VARIANT = dict(schedule="2x", init="imagenet", weights="detectron", multi_scale=False, legacy="none")

# Normalization of the pixels under which ImageNet weights were trained: the .pkl files that Detectron starts from
# (MSRA's ResNets, Caffe's VGG networks), and the .pth files of torchvision. Loading compares it with the file.
PIXELS = {
    "detectron": dict(pixel_mean=BASE["model"]["pixel_mean"], pixel_std=BASE["model"]["pixel_std"]),
    "torchvision": dict(pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375)),
}
# Range of the scale jitter by `multi_scale`: detectron2's short sides from 640 to 800 pixels, or the full size.
SCALE_JITTER = {True: (0.8, 1.0), False: (1.0, 1.0)}


def parse_arg(arg: str | None, **defaults):
    """Returns `defaults` with the values that `arg`, `key=value,key=value`, gives. Values keep their default's type.

    Raises:
        ValueError: a key is unknown, or a value does not fit the default's type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, found, text = item.partition("=")
        if not found or key not in defaults:
            raise ValueError(
                f"config argument {item!r} is unknown; write key=value with a key of {sorted(defaults)}"
            )
        kind = type(defaults[key])
        if kind is bool and text not in ("True", "False"):
            raise ValueError(f"config argument {item!r}: write True or False")
        try:
            values[key] = text == "True" if kind is bool else kind(text)
        except ValueError:
            raise ValueError(f"config argument {item!r}: expected a {kind.__name__}") from None
    return values


def choose(choices: dict, variant: dict, key: str):
    """Returns the entry of `choices` for the value of the variant's `key`.

    Raises:
        ValueError: there is no such choice.
    """
    if variant[key] not in choices:
        raise ValueError(
            f"config argument {key}={variant[key]!r} is unknown; choose one of {', '.join(map(str, choices))}"
        )
    return choices[variant[key]]


def base(variant: dict) -> ml_collections.ConfigDict:
    """Returns a new config with the values of `BASE` and the loss, suppression, voting and IoU head of a variant."""
    config = ml_collections.ConfigDict(BASE)
    config.model.mask_pooler = BASE["model"]["box_pooler"] | dict(resolution=14)
    config.model.box_loss = variant["loss"]
    config.model.iou_head.enabled = variant["iou_head"]
    default_voting = "none" if variant["loss"] in ("smooth_l1", "l1") else "variance"
    config.postprocess.suppression = variant["suppression"]
    config.postprocess.voting = variant["voting"] or default_voting
    return config


def update_poolers(config: ml_collections.ConfigDict, **fields) -> None:
    """Sets fields of both poolers: the one of the box head and the one of the mask head."""
    config.model.box_pooler.update(fields)
    config.model.mask_pooler.update(fields)


def set_schedule(config: ml_collections.ConfigDict, variant: dict, *, images: int) -> None:
    """Sets the batch size, the number of steps that shows `images` images, and the scale jitter.

    Raises:
        ValueError: the batch size is not positive.
    """
    batch_size = variant["batch_size"]
    if batch_size < 1:
        raise ValueError(f"config argument batch_size={batch_size}: write a positive number")
    config.train.update(batch_size=batch_size, num_steps=round(images / batch_size))
    config.data.scale_jitter = SCALE_JITTER[variant["multi_scale"]]


def set_legacy(config: ml_collections.ConfigDict, variant: dict) -> None:
    """Sets whether the network and the post-processing compute as the released code does (docs/legacy.md)."""
    legacy = choose({"none": False, "detectron": True}, variant, "legacy")
    config.model.rpn.update(box_coder="corner" if legacy else "center", plus_one_widths=legacy)
    update_poolers(config, plus_one_widths=legacy)
    if legacy:
        config.postprocess.update(sigma_t=0.01, voters="remaining", voting_iou_floor=0.01)
        config.postprocess.update(variance_order="detectron", plus_one_widths=True)


def set_resnet_weights(config: ml_collections.ConfigDict, variant: dict) -> None:
    """Sets the pixels, strides and pooling under which the weights of a ResNet were trained."""
    config.model.update(choose(PIXELS, variant, "weights"))
    config.model.backbone.stride_in_1x1 = variant["weights"] == "detectron"
    config.model.init_partial = choose({"imagenet": False, "detector": True}, variant, "init")
    set_legacy(config, variant)
    # Detectron's own RoIAlign is not aligned.
    update_poolers(config, aligned=variant["init"] == "imagenet" and variant["legacy"] == "none")
