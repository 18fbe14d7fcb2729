"""Networks of Tables 2 to 6, of the sigma_t figure and of the uncertainty tables, each trained once for all.

A family is a config file and some of its fields; a family and a loss are a network. Its folder is below
`--networks_dir` (default `runs/PRESET_networks`), holds the results of all its rows, and is trained by the first
experiment that needs it:

    runs/mini_networks/kl/          also Table 3's first head, Tables 4, 5 and 6, and the figure
    runs/mini_networks/mask_kl/     Table 2, and Table 3's last head

The folders `smooth_l1`, `kl` and `iou_net` have the names that Table 1 and `experiments.methods` use, so that their
networks can be used here: `--networks_dir=runs/table1_mini`, or `--networks_dir=runs/methods_mini/seed0
--num_epochs=3`. A folder of networks holds one seed.

In the paper's setting every network starts from ImageNet weights. The networks that its authors released start from a
finished detector instead, which the ResNet-50 configs call `init=detector`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from experiments import runs
from experiments.mask_scenes import PYRAMID
from klbox_jax.evaluation.voc import evaluate_voc
from klbox_jax.files import read_json, write_json

_NETWORKS_DIR = flags.DEFINE_string(
    "networks_dir", "", "Folder of the networks of Tables 2 to 6; default runs/PRESET_networks."
)
_INIT_WEIGHTS_M = flags.DEFINE_string(
    "init_weights_vgg_cnn_m_1024", "", "ImageNet weights of Table 6's smaller backbone, --preset=full."
)

# Images a second in training and their source, only for the estimates of a dry run.
ASSUMED_SPEEDS = {
    "mini": (95.0, "configs/scenes.py: 25000 images in 263 seconds on two CPU cores"),
    "full": (9.5, "detectron2's model zoo: R50-FPN, 16 images in 0.210 seconds on 8 V100"),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks that differ only in their loss."""

    prefix: str  # of the names of their folders
    config: str  # the config file
    arg: str = ""  # of the config file, without the loss
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config fields to replace


FAMILIES = {
    # mini
    "one_level": Family("", runs.SCENES_CONFIG),
    "pyramid": Family(
        "pyramid_", runs.SCENES_CONFIG, "", {f"model.box_pooler.{name}": x for name, x in PYRAMID.items()}
    ),
    "mask": Family("mask_", "experiments/mask_scenes.py"),
    # full
    "vgg16": Family("vgg16_", "configs/faster_rcnn_vgg16.py", "data=coco"),
    "resnet50_c4": Family("resnet50_c4_", "configs/faster_rcnn_resnet50_c4.py"),
    "resnet50_fpn": Family("resnet50_fpn_", "configs/faster_rcnn_resnet50_fpn.py"),
    "mask_resnet50_fpn": Family("mask_resnet50_fpn_", "configs/mask_rcnn_resnet50_fpn.py"),
    "vgg16_voc": Family("vgg16_voc_", "configs/faster_rcnn_vgg16.py", "data=voc"),
    "vgg_cnn_m_1024_voc": Family("vgg_cnn_m_1024_voc_", "configs/faster_rcnn_vgg_cnn_m_1024.py"),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A family with a loss."""

    family: str  # a key of `FAMILIES`
    loss: str  # `config.model.box_loss`, or `iou_net`: smooth-L1 and an IoU head

    @property
    def name(self) -> str:
        """The name of its folder."""
        return FAMILIES[self.family].prefix + self.loss

    @property
    def workdir(self) -> pathlib.Path:
        """Its folder."""
        return pathlib.Path(_NETWORKS_DIR.value or f"runs/{runs.PRESET.value}_networks") / self.name

    @property
    def arg(self) -> str:
        """The argument of its config file."""
        loss = "smooth_l1" if self.loss == "iou_net" else self.loss
        return ",".join(filter(None, (f"loss={loss}", FAMILIES[self.family].arg)))

    def variant(self) -> tuple[str, str, dict[str, object]]:
        """Returns its config file, the argument of that, and the fields to replace; ValueError if a flag is missing."""
        fields = {"seed": runs.SEED.value, **runs.schedule_fields(), **runs.preset_fields()}
        if self.family == "vgg_cnn_m_1024_voc":
            if not (_INIT_WEIGHTS_M.value or runs.DRY_RUN.value):
                raise ValueError("VGG-CNN-M-1024 needs --init_weights_vgg_cnn_m_1024=FILE")
            fields["model.init_weights"] = _INIT_WEIGHTS_M.value or "INIT_WEIGHTS_VGG_CNN_M_1024"
        if self.loss == "iou_net":
            fields["model.iou_head.enabled"] = True
        family = FAMILIES[self.family]
        return family.config, self.arg, fields | family.fields

    def config(self) -> ml_collections.ConfigDict:
        """Returns its config."""
        return runs.load_config(*self.variant())


def train_and_evaluate(network: Network, rows: Sequence[runs.Row], *, voc: bool = False) -> list[dict]:
    """Returns the table's entries for rows of a network; trains and evaluates only what is missing.

    With `voc` they have VOC 2007's average precision, `AP_voc`; on the scenes too, which replace VOC in miniature.
    """
    config, workdir = network.config(), network.workdir
    entries = runs.train_and_evaluate(config, workdir, rows)
    for entry in entries:
        if voc and "AP_voc" not in entry:
            folder = workdir / "eval" / str(entry["steps"]) / entry["name"]
            if not (folder / "voc.json").exists():
                truth = runs.job_of(config, workdir).eval_source.coco_ground_truth()
                found = evaluate_voc(truth, read_json(folder / "detections.json"))
                write_json(folder / "voc.json", {"AP_voc": found["AP_11_points"]})
            entry["AP_voc"] = read_json(folder / "voc.json")["AP_voc"]
    return entries


def plan(experiment: str, networks: Sequence[Network]) -> str:
    """Returns the text of a dry run: the data, each training with its command, steps and estimate, and the sum."""
    speed, source = ASSUMED_SPEEDS[runs.PRESET.value]
    configs = {network: network.config() for network in networks}
    data_lines, lines, total = set(), [], 0.0
    for network, config in configs.items():
        data, backbone = config.data, config.model.backbone.name
        where = f" in {data.root}" if data.root else ", made where they are missing"
        data_lines.add(
            f"data: {data.name}{where}: trained on {data.train_split}, evaluated on {data.eval_split}"
        )
        steps, batch_size = _num_steps(config), config.train.batch_size
        hours = steps * batch_size / speed / 3600
        total += hours
        lines += [
            f"{network.name}: {steps} steps of {batch_size} images, estimate {hours:.2f} device hours, {backbone} from "
            f"{config.model.init_weights or 'random weights'}",
            f"  {runs.command(*network.variant(), network.workdir)}",
        ]
    lines += [
        f"{experiment}: trainings: {len(networks)}, estimate {total:.2f} device hours; finished ones are skipped.",
        f"Estimates assume {speed:g} images a second in training ({source}; taken for every network), and leave "
        "evaluation out.",
    ]
    return "\n".join([*data_lines, *lines])


def _num_steps(config: ml_collections.ConfigDict) -> int:
    train = config.train
    if train.num_steps or config.data.name != "scenes":
        return train.num_steps
    return round(train.num_epochs * (config.data.num_images.train // train.batch_size))
