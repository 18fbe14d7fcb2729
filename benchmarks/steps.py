"""Training and eval steps of detectors with random weights on random images, ready to be compiled and run."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from klbox_jax import distributed
from klbox_jax.evaluation.eval_step import compile_eval_step
from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch, GroundTruth
from klbox_jax.train.optimizer import build_optimizer
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_train_step

KINDS = ("train", "eval")
OBJECTS = 8
# Pixels of a cell of the smooth noise, and of the canvas for which the sides of the objects are given.
CELL, SIDE = 20, 320
# Small enough that the weights stay the same, however many steps are timed.
LEARNING_RATE = 1e-6
# Factors on the parameters by the end of their path. The last norm of each residual block is weakened, because every
# sum with its shortcut would double the variance; anchors move a little, and edges have a variance of about 1.
FACTORS = {"norm3/scale": 0.3, "anchor_deltas/kernel": 0.1, "bbox_log_var/kernel": 0.1}


def make_batch(
    num_images: int, *, canvas: tuple[int, int], classes: int, slots: int = OBJECTS, seed: int = 0
) -> Batch:
    """Returns smooth noise with `OBJECTS` objects of many sizes, in `slots` ground-truth slots of each image.

    The images fill the canvas, given by height and width.
    """
    rng = np.random.default_rng(seed)
    height, width = canvas
    cells = math.ceil(height / CELL), math.ceil(width / CELL)
    coarse = rng.uniform(0, 255, (num_images, *cells, 3))
    smooth = np.kron(coarse, np.ones((1, CELL, CELL, 1)))[:, :height, :width]
    images = smooth + rng.normal(0, 20, (num_images, height, width, 3))
    size = np.array([width, height])
    sides = np.exp(rng.uniform(np.log(16), np.log(240), (num_images, OBJECTS, 2))) * (size / SIDE)
    corners = rng.uniform(size=sides.shape) * (size - sides)
    gt = GroundTruth(
        boxes=np.concatenate([corners, corners + sides], axis=-1).astype(np.float32),
        classes=rng.integers(0, classes, (num_images, OBJECTS)).astype(np.int32),
        is_crowd=np.zeros((num_images, OBJECTS), bool),
        valid=np.ones((num_images, OBJECTS), bool),
    )

    def pad(rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, [(0, 0), (0, slots - OBJECTS)] + [(0, 0)] * (rows.ndim - 2))

    return Batch(
        images=np.clip(images, 0, 255).astype(np.uint8),
        image_size=np.tile(np.array(canvas, np.int32), (num_images, 1)),
        scale=np.ones((num_images, 2), np.float32),
        image_id=np.arange(num_images, dtype=np.int32),
        valid=np.ones(num_images, bool),
        gt=jax.tree.map(pad, gt),
    )


def param_shapes(model: GeneralizedRCNN, batch: Batch) -> dict[str, Any]:
    """Returns the shapes of a detector's parameters; nothing is compiled."""
    leaves, structure = jax.tree.flatten(batch)

    def init(leaves):
        key, batch = jax.random.key(0), jax.tree.unflatten(structure, leaves)
        return model.init(key, batch, method="init_all_heads")["params"]

    return jax.eval_shape(init, leaves)


def random_params(shapes: dict[str, Any], factors: Mapping[str, float] = FACTORS) -> dict[str, Any]:
    """Returns parameters under which activations keep their size, and proposals and classes differ.

    Kernels are normal, with the gain of a rectifier; norms change nothing. The network's own initialization would have
    to be compiled first.

    Args:
        shapes: of the parameters.
        factors: on the parameters whose path ends in the key.
    """
    rng = np.random.default_rng(0)

    def draw(path: tuple[str, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(path)
        factor = next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
        if path[-1] == "kernel":
            fan_in = shape.size // shape.shape[-1]
            values = rng.standard_normal(shape.shape, np.float32) * np.sqrt(2 / fan_in)
        else:
            values = np.full(shape.shape, path[-1] in ("scale", "var"))
        return (factor * values).astype(np.float32)

    return unflatten_dict({path: draw(path, shape) for path, shape in flatten_dict(shapes).items()})


@dataclasses.dataclass(frozen=True)
class Step:
    """A step over all devices of this process, and its arguments."""

    kind: str  # of `KINDS`
    model: GeneralizedRCNN  # the network
    mesh: Mesh  # the devices
    function: Any  # the jitted step
    first: Any  # the training state, or the parameters of an eval step, in NumPy
    batch: Batch  # in NumPy

    def param_bytes(self) -> int:
        """Returns the bytes of the parameters."""
        params = self.first.params if self.kind == "train" else self.first
        return sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def lower(self) -> jax.stages.Lowered:
        """Returns the step lowered for its arguments."""
        return self.function.lower(self.first, self.batch)

    def runner(self, function: Callable | None = None) -> Callable[[], None]:
        """Returns a function that runs the step to its end; a training step continues from the one before.

        It raises FloatingPointError if the loss is not finite. The first run compiles, unless `function` is compiled.
        """
        function, is_training = function or self.function, self.kind == "train"
        # The step donates its state: a copy, because the arrays of `first` belong to NumPy.
        first = jax.device_put(jax.tree.map(jnp.array, self.first), distributed.replicated(self.mesh))
        batch = distributed.put_batch(self.batch, self.mesh)

        def run() -> None:
            nonlocal first
            found = jax.block_until_ready(function(first, batch))
            if is_training:
                first, scalars = found
                if not np.isfinite(scalars["total_loss"]):
                    raise FloatingPointError("the loss of the training step is not finite")

        return run


def make_step(kind: str, config: Any, batch: Batch, *, classes: int) -> Step:
    """Returns the step of a whole config on a batch, with random weights; its learning rate is `LEARNING_RATE`."""
    model, mesh = build_model(config.model, num_classes=classes), distributed.make_mesh()
    params = random_params(param_shapes(model, batch))
    if kind == "eval":
        settings = {"": PostprocessSettings(**config.postprocess.to_dict())}
        function = compile_eval_step(mesh, model=model, settings=settings)
        return Step(kind, model, mesh, function, params, batch)
    config.optimizer.learning_rate = LEARNING_RATE
    optimizer, schedule = build_optimizer(
        config.optimizer, batch_size=len(batch.image_id), accumulate_steps=1, total_steps=1000
    )
    frozen = config.optimizer.frozen
    function = compile_train_step(
        mesh, model=model, optimizer=optimizer, schedule=schedule, seed=0, frozen=frozen
    )
    state = TrainState(step=np.zeros((), np.int32), params=params, opt_state=optimizer.init(params))
    return Step(kind, model, mesh, function, state, batch)


def held_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a device holds for a program: arguments, results and temporary arrays.

    By the compiler's plan, exact without a run. Results that replace arguments count once.
    """
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
