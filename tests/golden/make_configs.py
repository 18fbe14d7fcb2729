"""Writes configs.json: the fields of every config, and those that each variant changes.

    python -m tests.golden.make_configs

The default of a family is written in full, one field a line. A variant is written as its differences from the
default: the new value of each field, or "absent" for a field that the variant does not have. Arrays are tuples.
"""

import importlib
import json
import pathlib

FILE = pathlib.Path(__file__).parent / "configs.json"
LOSS_AND_VOTING = (
    *("loss=smooth_l1", "loss=l1", "loss=gaussian_nll"),
    *("suppression=hard", "suppression=soft_linear", "suppression=iou_guided"),
    *("voting=none", "voting=variance", "voting=iou", "loss=smooth_l1,voting=iou", "iou_head=True"),
)
PHOTOGRAPHS = ("multi_scale=True", "batch_size=2", "batch_size=3")
LEGACY = ("legacy=none", "legacy=detectron", "legacy=detectron,loss=smooth_l1")
WEIGHTS = ("weights=detectron", "weights=torchvision", "weights=torchvision,legacy=detectron")
INIT = (
    "init=imagenet",
    "init=detector",
    "init=detector,legacy=detectron",
    "init=detector,weights=torchvision",
)
RESNET = (*LOSS_AND_VOTING, *PHOTOGRAPHS, *LEGACY, *WEIGHTS, *INIT)
RESNET += ("schedule=1x", "schedule=2x", "schedule=1x,batch_size=4")
RESNET_FPN = (*RESNET, "schedule=4x", "depth=50", "depth=101", "depth=101,weights=torchvision")
VGG16 = (*LOSS_AND_VOTING, *PHOTOGRAPHS, *LEGACY, *WEIGHTS, "data=coco", "data=voc", "data=voc,batch_size=2")
VGG16 += ("data=voc,multi_scale=True", "data=voc,legacy=detectron", "data=voc,weights=torchvision")
VARIANTS = {
    "faster_rcnn_mobilenet_v2_fpn": (*LOSS_AND_VOTING, "data=coco", "data=voc", "data=tfds"),
    "faster_rcnn_resnet50_c4": RESNET,
    "faster_rcnn_resnet50_fpn": RESNET_FPN,
    "faster_rcnn_vgg16": VGG16,
    "faster_rcnn_vgg_cnn_m_1024": (*LOSS_AND_VOTING, *PHOTOGRAPHS),
    "mask_rcnn_resnet50_fpn": RESNET_FPN,
    "scenes": (*LOSS_AND_VOTING, "noise_scale=2", "noise_scale=0.5", "size=full", "size=tiny"),
    "torchvision": ("model=fasterrcnn_resnet50_fpn", "model=maskrcnn_resnet50_fpn"),
}


def resolve(family: str, arg: str | None = None) -> dict[str, str]:
    """Returns the fields of a config by dotted name; values are JSON, in which 1 and 1.0 differ."""
    config = importlib.import_module(f"configs.{family}").get_config(arg)
    return dict(sorted(_flatten(config.to_dict(), "")))


def _flatten(group, prefix):
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif "[" in repr(value):
            raise TypeError(f"{prefix}{name} = {value!r} has a list; write a tuple")
        else:
            yield f"{prefix}{name}", json.dumps(value)


def differences(fields: dict[str, str], default: dict[str, str]) -> dict[str, str]:
    """Returns the fields that differ from the default's; "absent" for those that only the default has."""
    missing = dict.fromkeys(default.keys() - fields.keys(), '"absent"')
    changed = {name: value for name, value in fields.items() if default.get(name) != value}
    return dict(sorted((changed | missing).items()))


def resolve_family(family: str) -> dict[str, dict[str, str]]:
    """Returns the fields of a family under "default", and the differences of each variant under its name."""
    default = resolve(family)
    return {
        "default": default,
        **{arg: differences(resolve(family, arg), default) for arg in VARIANTS[family]},
    }


def read() -> dict[str, dict[str, dict[str, str]]]:
    """Returns the content of the file by family, each in the form of `resolve_family`."""
    return {
        family: {
            name: {field: json.dumps(value) for field, value in fields.items()}
            for name, fields in variants.items()
        }
        for family, variants in json.loads(FILE.read_text()).items()
    }


def render(families: dict[str, dict[str, dict[str, str]]]) -> str:
    """Returns the text of the file: one line for each field of a default, and one for each variant."""

    def braces(items, indent):
        separator = ",\n" + " " * indent
        return "{" + separator[1:] + separator.join(items) + "\n" + " " * (indent - 1) + "}"

    texts = []
    for family, variants in families.items():
        entries = []
        for name, fields in variants.items():
            items = [f'"{field}": {value}' for field, value in fields.items()]
            text = braces(items, 3) if name == "default" else "{" + ", ".join(items) + "}"
            entries.append(f'"{name}": {text}')
        texts.append(f'"{family}": {braces(entries, 2)}')
    return braces(texts, 1) + "\n"


if __name__ == "__main__":
    FILE.write_text(render({family: resolve_family(family) for family in VARIANTS}))
