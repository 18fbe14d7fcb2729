"""Networks of Tables 2 to 6, of the sigma_t figure and of the uncertainty tables, each trained once for all.

A family is a config file and some of its fields. A family and a loss are a network. Its folder is below
`--networks_dir` (default `runs/PRESET_networks`) and holds the results of all its rows:

    runs/mini_networks/kl/          also Table 3's first head, Tables 4, 5 and 6, and the figure
    runs/mini_networks/mask_kl/     Table 2, and Table 3's last head

An experiment trains the networks that it needs and that are missing. The folders `smooth_l1`, `kl` and `iou_net` have
the names that Table 1 and `experiments.methods` use, so that their networks can be used here:
`--networks_dir=runs/table1_mini`, or `--networks_dir=runs/methods_mini/seed0 --num_epochs=3`. A folder of networks
holds one seed.

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
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir

_NETWORKS_DIR = flags.DEFINE_string(
    "networks_dir", "", "Folder of the networks of Tables 2 to 6; default runs/PRESET_networks."
)
_INIT_WEIGHTS_M = flags.DEFINE_string(
    "init_weights_vgg_cnn_m_1024", "", "ImageNet weights of Table 6's smaller backbone, --preset=full."
)

# Images a second in training and their source, only for the estimates of a dry run.
ASSUMED_SPEEDS = {
    "mini": (
        95.0,
        "configs/scenes.py: 25000 images in 263 seconds on two CPU cores; taken for every network",
    ),
    "full": (
        9.5,
        "detectron2's model zoo: R50-FPN, 16 images in 0.210 seconds on 8 V100; taken for every network",
    ),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks that differ only in their loss.

    Attributes:
        prefix: of the names of their folders.
        config: the config file.
        arg: of the config file, without the loss.
        fields: config fields to replace.
    """

    prefix: str
    config: str
    arg: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    # mini
    "one_level": Family("", runs.SCENES_CONFIG),
    "pyramid": Family(
        "pyramid_",
        runs.SCENES_CONFIG,
        fields={f"model.box_pooler.{name}": value for name, value in PYRAMID.items()},
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
    """A family with a loss.

    Attributes:
        family: a key of `FAMILIES`.
        loss: `config.model.box_loss`, or `iou_net`: smooth-L1 and an IoU head.
    """

    family: str
    loss: str

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

    def fields(self) -> dict[str, object]:
        """Returns the config fields to replace; raises ValueError where a flag is missing."""
        fields = {"seed": runs.SEED.value, **runs.schedule_fields(), **runs.preset_fields()}
        if self.family == "vgg_cnn_m_1024_voc":
            if not (_INIT_WEIGHTS_M.value or runs.DRY_RUN.value):
                raise ValueError("VGG-CNN-M-1024 needs --init_weights_vgg_cnn_m_1024=FILE")
            fields["model.init_weights"] = _INIT_WEIGHTS_M.value or "INIT_WEIGHTS_VGG_CNN_M_1024"
        if self.loss == "iou_net":
            fields["model.iou_head.enabled"] = True
        return fields | FAMILIES[self.family].fields

    def config(self) -> ml_collections.ConfigDict:
        """Returns its config."""
        return runs.load_config(FAMILIES[self.family].config, self.arg, self.fields())

    def command(self) -> str:
        """Returns the command line that trains it and evaluates it under its config's post-processing."""
        return runs.command(FAMILIES[self.family].config, self.arg, self.fields(), self.workdir)


def train_and_evaluate(network: Network, rows: Sequence[runs.Row], *, voc: bool = False) -> list[dict]:
    """Returns the table's entries for rows of a network; trains and evaluates only what is missing.

    With `voc` they have VOC 2007's average precision, `AP_voc`; on the scenes too, which replace VOC in miniature.
    """
    config, workdir = network.config(), network.workdir
    entries = runs.train_and_evaluate(config, workdir, rows)
    for entry in entries:
        if voc and "AP_voc" not in entry:
            folder = workdir / "eval" / str(entry["steps"]) / entry["name"]
            entry["AP_voc"] = _voc_precision(config, workdir, folder)
    return entries


def _voc_precision(config, workdir: pathlib.Path, folder: pathlib.Path) -> float | None:
    file = folder / "voc.json"
    if not file.exists():
        truth = Job(config=config, workdir=Workdir(workdir)).eval_source.coco_ground_truth()
        found = evaluate_voc(truth, read_json(folder / "detections.json"))
        write_json(file, {"AP_voc": found["AP_11_points"]})
    return read_json(file)["AP_voc"]


def plan(experiment: str, networks: Sequence[Network]) -> str:
    """Returns the text of a dry run: the data, each training with its command, steps and estimate, and the sum."""
    speed, source = ASSUMED_SPEEDS[runs.PRESET.value]
    lines, total = [], 0.0
    configs = {network: network.config() for network in networks}
    for data in {(c.data.name, c.data.root, c.data.train_split, c.data.eval_split) for c in configs.values()}:
        name, root, train_split, eval_split = data
        where = f" in {root}" if root else ", made where they are missing"
        lines.append(f"data: {name}{where}: trained on {train_split}, evaluated on {eval_split}")
    for network, config in configs.items():
        steps, batch_size = _num_steps(config), config.train.batch_size
        hours = steps * batch_size / speed / 3600
        total += hours
        weights = config.model.init_weights
        lines += [
            f"{network.name}: {steps} steps of {batch_size} images, estimate {hours:.2f} device hours, "
            f"{config.model.backbone.name} from {weights or 'random weights'}",
            f"  {network.command()}",
        ]
    lines += [
        f"{experiment}: trainings: {len(networks)}, estimate {total:.2f} device hours; what is finished is skipped.",
        f"Estimates assume {speed:g} images a second in training ({source}), and leave evaluation out.",
    ]
    return "\n".join(lines)


def _num_steps(config: ml_collections.ConfigDict) -> int:
    train = config.train
    if train.num_steps or config.data.name != "scenes":
        return train.num_steps
    return round(train.num_epochs * (config.data.num_images.train // train.batch_size))
