"""Size, arithmetic and memory of the full-scale detectors, from their shapes alone: writes docs/models.md.

    python -m benchmarks.model_report

Nothing is trained or run: the programs are traced for one image on the largest canvas of each config. Takes half a
minute.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging

from benchmarks.flops import count_flops, largest_product_bytes, saved_bytes
from experiments.runs import load_config
from klbox_jax.models.build import build_model
from klbox_jax.report.tables import markdown_table
from klbox_jax.structures import Batch, GroundTruth
from klbox_jax.train.step import stop_frozen

# File, argument and number of classes of each row.
MODELS = (
    ("configs/faster_rcnn_vgg_cnn_m_1024.py", "", 20),
    ("configs/faster_rcnn_vgg16.py", "data=voc", 20),
    ("configs/faster_rcnn_vgg16.py", "", 80),
    ("configs/faster_rcnn_resnet50_c4.py", "", 80),
    ("configs/faster_rcnn_resnet50_fpn.py", "", 80),
    ("configs/faster_rcnn_resnet50_fpn.py", "depth=101", 80),
    ("configs/mask_rcnn_resnet50_fpn.py", "", 80),
    ("configs/mask_rcnn_resnet50_fpn.py", "depth=101", 80),
)
MEMORIES = (16, 24, 40, 80)  # GB
# The share of the memory that is planned with; the rest is the compiler's.
USED_SHARE = 0.9

TEXT = """# The full-scale detectors

Written by `python -m benchmarks.model_report`. None of them was trained yet; the numbers follow from shapes alone.

{table}

* **parameters**: with the four of each frozen batch norm, and with the log-variance branch of KL Loss.
* **canvas**: height x width of the largest canvas, for which all that follows is.
* **GFLOP, forward**: of one image up to the raw predictions of all proposals; two operations for each multiply-add of
  convolutions and products, everything else left out. RoIAlign is such products, with matrices that are mostly zeros,
  and they count whole. Heads that look at the final detections only (masks) are not in it.
* **GFLOP, step**: of one image in training, forward and backward, frozen layers without a backward pass.
* **activations**: an estimate: what differentiation keeps of one image from the forward to the backward pass, in
  float32, and the largest result of a single product, which RoIAlign often has. The compiler may keep less, and may
  need more while it works.
* **batch on**: an estimate: images that fit beside parameters, gradients and momentum, with a tenth of the memory left
  over. Measure before you rely on it.
"""


def example_batch(config: Any) -> Batch:
    """Returns one black image on the largest canvas of a config, with all its ground-truth slots.

    Args:
        config: a `config.data`.
    """
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
    leaves, structure = jax.tree.flatten(example_batch(config.data))
    key = jax.random.key(0)

    def init(leaves):
        return model.init(key, jax.tree.unflatten(structure, leaves), method="init_all_heads")["params"]

    def loss(params, leaves):
        params = stop_frozen(params, config.optimizer.frozen)
        batch = jax.tree.unflatten(structure, leaves)
        outputs = model.apply(
            {"params": params}, batch, key, jnp.zeros((), jnp.int32), method="train_forward"
        )
        return sum(outputs.losses.values())

    def predict(params, leaves):
        batch = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(model.apply({"params": params}, batch, method="predict"))

    params = jax.eval_shape(init, leaves)
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
    """Returns how many images fit beside three copies of the parameters; 0 if none does."""
    left = USED_SHARE * memory_gb * 1e9 - 3 * parameter_bytes
    return max(0, int(left // image_bytes))


def table(models: Sequence[tuple[str, str, int]] = MODELS) -> str:
    """Returns the Markdown table of the models, traced one after the other."""
    columns = (
        "config",
        "canvas",
        "parameters",
        "GFLOP, forward",
        "GFLOP, step",
        "activations, MB",
        *(f"batch on {memory} GB" for memory in MEMORIES),
    )
    rows = []
    for path, arg, num_classes in models:
        config = load_config(path, arg, {})
        numbers = measure(config, num_classes=num_classes)
        logging.info("%s:%s %s", path, arg, numbers)
        canvas = max(config.data.canvases, key=math.prod)
        sizes = {
            "parameter_bytes": numbers["parameter_bytes"],
            "image_bytes": numbers["saved_bytes"] + numbers["product_bytes"],
        }
        rows.append(
            (
                f"{pathlib.Path(path).stem}{':' + arg if arg else ''}",
                f"{canvas[0]} x {canvas[1]}",
                f"{numbers['parameters']:,}",
                f"{numbers['forward_flops'] / 1e9:,.0f}",
                f"{numbers['step_flops'] / 1e9:,.0f}",
                f"{sizes['image_bytes'] / 1e6:,.0f}",
                *(str(largest_batch(memory, **sizes)) for memory in MEMORIES),
            )
        )
    return markdown_table(columns, rows, text_columns=("canvas",))


def _main(argv: list[str]) -> None:
    del argv
    path = pathlib.Path(_OUTPUT.value)
    path.write_text(TEXT.format(table=table()), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "docs/models.md", "The file to write.")
    app.run(_main)
