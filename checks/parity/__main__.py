"""Compares every stage, loss and gradient of our detectors with torchvision's.

    make parity

torchvision's Faster and Mask R-CNN with ResNet-50-FPN get random weights, ours the same through the reader of weight
files. Two small images, one of them padded, then go through both. The table shows the largest relative error of each
stage and the number of compared tensors; runs/parity/parity.json holds the same. Activations, losses and gradients may
differ by 1e-4, the rounding over a hundred layers.

Gradients have one more cause to differ: where rounding puts the input of a rectifier on the other side of zero, a few
neighbouring layers are off by some 1e-4. Such a difference disappears with another `--weights_seed`; an error does not.
"""

import pathlib
import sys
import tempfile
import time

import jax
from absl import flags

from checks.parity.comparison import summary, table
from klbox_jax import cli
from klbox_jax.files import write_json

MODELS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "vgg16")


def main(_: list[str]) -> None:
    """Compares, prints the table, writes parity.json, and exits with 1 if a comparison fails."""
    # torchvision is an extra: everything else runs without it.
    from benchmarks import torchvision_peer
    from checks.parity import detectors

    started, comparisons = time.perf_counter(), {}
    for model in _MODELS.value:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"seed": _WEIGHTS_SEED.value, "folder": pathlib.Path(folder)}
            comparisons[model] = list(
                detectors.compare_vgg16(**arguments)
                if model == "vgg16"
                else detectors.compare_detector(model, **arguments)
            )
        print(f"{model} is compared", flush=True)
    result = summary(comparisons, {"jax": jax.__version__} | torchvision_peer.versions())
    path = pathlib.Path(_OUTPUT.value) / "parity.json"
    write_json(path, result)
    print(table(comparisons))
    print(
        f"{result['compared']} tensors compared in {time.perf_counter() - started:.0f} seconds, "
        f"{len(result['failures'])} failures; {path}"
    )
    if result["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "runs/parity", "Folder of parity.json.")
    _MODELS = flags.DEFINE_multi_enum("model", MODELS, MODELS, "Networks to compare.")
    _WEIGHTS_SEED = flags.DEFINE_integer("weights_seed", 1, "Seed of the weights and the images.")
    cli.start(main)
