"""Size, arithmetic and memory of the full-scale detectors, from their shapes alone: the table of docs/models.md.

    python -m benchmarks.model_report

Nothing is trained or run: the programs are traced for one image on the largest canvas of each config. Takes half a
minute.
"""

import importlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags, logging

from benchmarks.flops import count_flops, largest_product_bytes, saved_bytes
from benchmarks.steps import param_shapes
from klbox_jax import cli
from klbox_jax.models.build import build_model
from klbox_jax.report import columns, documents
from klbox_jax.structures import Batch, GroundTruth
from klbox_jax.train.step import stop_frozen

# Config, argument and number of classes of each row.
MODELS = (
    ("faster_rcnn_vgg_cnn_m_1024", "", 20),
    ("faster_rcnn_vgg16", "data=voc", 20),
    ("faster_rcnn_vgg16", "", 80),
    ("faster_rcnn_resnet50_c4", "", 80),
    ("faster_rcnn_resnet50_fpn", "", 80),
    ("faster_rcnn_resnet50_fpn", "depth=101", 80),
    ("mask_rcnn_resnet50_fpn", "", 80),
    ("mask_rcnn_resnet50_fpn", "depth=101", 80),
)
MEMORIES = (16, 24, 40, 80)  # GB
# The share of the memory that is planned with; the rest is the compiler's.
USED_SHARE = 0.9


def get_config(name: str, arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the file configs/NAME.py."""
    return importlib.import_module(f"configs.{name}").get_config(arg)


def example_batch(config: Any) -> Batch:
    """Returns one black image on the largest canvas of a `config.data`, with all its ground-truth slots."""
    canvas = max(config.canvases, key=math.prod)
    slots, mask_size = config.max_gt, config.get("mask_size", 0)
    return Batch(
        images=np.zeros((1, *canvas, 3), np.uint8),
        image_size=np.array([canvas], np.int32),
        scale=np.ones((1, 2), np.float32),
        image_id=np.zeros(1, np.int32),
        valid=np.ones(1, bool),
        gt=GroundTruth(
            boxes=np.zeros((1, slots, 4), np.float32),
            classes=np.zeros((1, slots), np.int32),
            is_crowd=np.zeros((1, slots), bool),
            valid=np.ones((1, slots), bool),
            masks=np.zeros((1, slots, mask_size, mask_size), np.uint8) if mask_size else None,
        ),
    )


def measure(config: ml_collections.ConfigDict, *, num_classes: int) -> dict[str, int]:
    """Returns the numbers of one image: operations, bytes that a training step keeps and its largest product.

    The names: `parameters`, `parameter_bytes`, `forward_flops`, `step_flops`, `saved_bytes`, `product_bytes`.
    """
    model = build_model(config.model, num_classes=num_classes)
    batch = example_batch(config.data)
    leaves, structure = jax.tree.flatten(batch)
    key = jax.random.key(0)

    def loss(params, leaves):
        params = stop_frozen(params, config.optimizer.frozen)
        arguments = (jax.tree.unflatten(structure, leaves), key, jnp.zeros((), jnp.int32))
        outputs = model.apply({"params": params}, *arguments, method="train_forward")
        return sum(outputs.losses.values())

    def predict(params, leaves):
        batch = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(model.apply({"params": params}, batch, method="predict"))

    params = param_shapes(model, batch)
    step = jax.make_jaxpr(jax.grad(loss))(params, leaves).jaxpr
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "parameter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        "forward_flops": count_flops(jax.make_jaxpr(predict)(params, leaves).jaxpr),
        "step_flops": count_flops(step),
        "saved_bytes": saved_bytes(loss, params, leaves),
        "product_bytes": largest_product_bytes(step),
    }


def largest_batch(memory_gb: int, *, parameter_bytes: int, image_bytes: int) -> int:
    """Returns the number of images that fit next to three copies of the parameters; 0 if none does."""
    left = USED_SHARE * memory_gb * 1e9 - 3 * parameter_bytes
    return max(0, int(left // image_bytes))


def rows_of(models: Sequence[tuple[str, str, int]] = MODELS) -> list[dict]:
    """Returns the records of the models, traced one after the other."""
    rows = []
    for name, arg, num_classes in models:
        config = get_config(name, arg)
        numbers = measure(config, num_classes=num_classes)
        logging.info("%s:%s %s", name, arg, numbers)
        height, width = max(config.data.canvases, key=math.prod)
        image_bytes = numbers["saved_bytes"] + numbers["product_bytes"]
        row = {
            "config": f"{name}{':' + arg if arg else ''}",
            "canvas": f"{height} x {width}",
            "parameters": numbers["parameters"],
            "GFLOP, forward": numbers["forward_flops"] / 1e9,
            "GFLOP, step": numbers["step_flops"] / 1e9,
            "activations, MB": image_bytes / 1e6,
        }
        sizes = {"parameter_bytes": numbers["parameter_bytes"], "image_bytes": image_bytes}
        rows.append(row | {f"batch on {gb} GB": largest_batch(gb, **sizes) for gb in MEMORIES})
    return rows


def table() -> str:
    """Returns the table of docs/models.md."""
    table_columns = [
        *(columns.text("config"), columns.text("canvas"), columns.number("parameters", ",d")),
        *columns.numbers(",.0f", ("GFLOP, forward", "GFLOP, step", "activations, MB")),
        *columns.numbers("d", [f"batch on {memory} GB" for memory in MEMORIES]),
    ]
    return columns.table(table_columns, rows_of())


def main(_: list[str]) -> None:
    """Writes the table into the document."""
    path = pathlib.Path(_OUTPUT.value)
    documents.update([path], {"models": table}, check=False, command="python -m benchmarks.model_report")
    print(path)


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "docs/models.md", "The document whose table `models` is written.")
    cli.start(main)
