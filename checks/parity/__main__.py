"""Are ours torchvision's detectors? Every stage, every loss and every gradient of both, side by side.

    make parity

torchvision's Faster and Mask R-CNN with ResNet-50-FPN get random weights, ours the same through the reader of
weight files. Two small images, one of them padded, then go through both. The table shows the largest relative
error of each stage and how many tensors were compared; runs/parity/parity.json holds the same. Activations,
losses and gradients may differ by 1e-4, which is rounding over a hundred layers.

Gradients have one more cause to differ: where rounding puts the input of a rectifier on the other side of zero, a
few neighbouring layers are off by some 1e-4. That is gone with another `--weights_seed`; an error is not.
"""

import pathlib
import sys
import tempfile
import time

import jax
from absl import app, flags

from checks.parity.comparison import summary, table
from klbox_jax.files import write_json

MODELS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "vgg16")

_OUTPUT = flags.DEFINE_string("output", "runs/parity", "Folder of parity.json.")
_PARTS = flags.DEFINE_multi_enum("model", MODELS, MODELS, "What is compared.")
_WEIGHTS_SEED = flags.DEFINE_integer("weights_seed", 1, "Seed of the weights and the images.")


def main(argv: list[str]) -> None:
    """Compares, prints the table, writes parity.json, and fails where a comparison does."""
    del argv
    # The peer is an extra of its own: everything else runs without it.
    from checks.parity import networks, peer

    started, comparisons = time.perf_counter(), {}
    for model in _PARTS.value:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"seed": _WEIGHTS_SEED.value, "folder": pathlib.Path(folder)}
            comparisons[model] = list(
                networks.compare_vgg16(**arguments)
                if model == "vgg16"
                else networks.compare_detector(model, **arguments)
            )
        print(f"{model} is compared", flush=True)
    result = summary(comparisons, {"jax": jax.__version__} | peer.versions())
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "parity.json", result)
    print(table(comparisons))
    print(
        f"{result['compared']} tensors compared in {time.perf_counter() - started:.0f} seconds, "
        f"{len(result['failures'])} failures; {output / 'parity.json'}"
    )
    if result["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
