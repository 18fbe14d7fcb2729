"""Our Faster R-CNN with ResNet-50-FPN in the benchmark's setting: a batch, a training step and an eval step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import faster_rcnn_resnet50_fpn
from klbox_jax import distributed
from klbox_jax.evaluation.eval_step import compile_eval_step
from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch, GroundTruth
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.optimizer import make_optimizer
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_train_step

CANVAS = (320, 320)
CLASSES = 80
TRAIN_IMAGES = 2
OBJECTS = 8
ROIS_PER_IMAGE = 128
PROPOSALS_BEFORE_NMS = 1000
TRAIN_PROPOSALS, TEST_PROPOSALS = 512, 1000
# So small that the weights stay what they are, however many steps are timed.
LEARNING_RATE = 1e-6


def make_config(loss: str) -> ml_collections.ConfigDict:
    """Returns the config of the full-scale detector with the benchmark's proposals and RoIs."""
    config = faster_rcnn_resnet50_fpn.get_config(f"loss={loss},weights=torchvision")
    config.model.roi_heads.batch_size_per_image = ROIS_PER_IMAGE
    config.model.rpn.pre_nms_topk = (PROPOSALS_BEFORE_NMS, PROPOSALS_BEFORE_NMS)
    config.model.rpn.post_nms_topk = (TRAIN_PROPOSALS, TEST_PROPOSALS)
    return config


def make_batch(num_images: int, *, seed: int = 0) -> Batch:
    """Returns smooth noise with objects of many sizes; the images fill the canvas."""
    rng = np.random.default_rng(seed)
    height, width = CANVAS
    coarse = rng.uniform(0, 255, (num_images, height // 20, width // 20, 3))
    images = np.kron(coarse, np.ones((1, 20, 20, 1))) + rng.normal(0, 20, (num_images, height, width, 3))
    sides = np.exp(rng.uniform(np.log(16), np.log(240), (num_images, OBJECTS, 2)))
    corners = rng.uniform(size=sides.shape) * (np.array([width, height]) - sides)
    return Batch(
        images=np.clip(images, 0, 255).astype(np.uint8),
        image_size=np.tile(np.array(CANVAS, np.int32), (num_images, 1)),
        scale=np.ones((num_images, 2), np.float32),
        image_id=np.arange(num_images, dtype=np.int32),
        valid=np.ones(num_images, bool),
        gt=GroundTruth(
            boxes=np.concatenate([corners, corners + sides], axis=-1).astype(np.float32),
            classes=rng.integers(0, CLASSES, (num_images, OBJECTS)).astype(np.int32),
            is_crowd=np.zeros((num_images, OBJECTS), bool),
            valid=np.ones((num_images, OBJECTS), bool),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Detector:
    """A network with its loss and its parameters.

    Attributes:
        config: the whole config.
        model: the network.
        params: see `random_params`.
    """

    config: ml_collections.ConfigDict
    model: GeneralizedRCNN
    params: dict[str, Any]


@functools.cache
def make_detector(loss: str) -> Detector:
    """Returns the detector that is trained with a loss."""
    config = make_config(loss)
    model = build_model(config.model, num_classes=CLASSES)
    return Detector(config, model, random_params(shapes_of(model, CANVAS)))


def shapes_of(model: GeneralizedRCNN, canvas: tuple[int, int]) -> dict[str, Any]:
    """Returns the shapes of a detector's parameters."""
    leaves, structure = jax.tree.flatten(dummy_batch(canvas))

    def init(leaves):
        key, batch = jax.random.key(0), jax.tree.unflatten(structure, leaves)
        return model.init(key, batch, method="init_all_heads")["params"]

    return jax.eval_shape(init, leaves)


# Factors on the parameters whose paths end so. The last norm of each residual block is weakened, else every sum with
# its shortcut would double the variance; anchors move a little, and edges have a variance of about 1.
FACTORS = {"norm3/scale": 0.3, "anchor_deltas/kernel": 0.1, "bbox_log_var/kernel": 0.1}


def random_params(shapes: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters under which activations keep their size, and proposals and classes differ.

    Kernels are normal, with the gain of a rectifier; norms change nothing. The network's own initialisation would have
    to be compiled first.
    """
    rng = np.random.default_rng(0)

    def draw(path: tuple[str, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(path)
        factor = next((factor for end, factor in FACTORS.items() if name.endswith(end)), 1.0)
        if path[-1] == "kernel":
            fan_in = shape.size // shape.shape[-1]
            values = rng.standard_normal(shape.shape, np.float32) * np.sqrt(2 / fan_in)
        else:
            values = np.full(shape.shape, path[-1] in ("scale", "var"))
        return (factor * values).astype(np.float32)

    return unflatten_dict({path: draw(path, shape) for path, shape in flatten_dict(shapes).items()})


class TrainStep:
    """The compiled training step, which goes on from its own state at each call."""

    def __init__(self, detector: Detector):
        """Puts the state and the batch on the device."""
        fields = detector.config.optimizer.to_dict()
        optimizer = make_optimizer(
            name=fields["name"],
            schedule=lambda step: jnp.float32(LEARNING_RATE),
            weight_decay=fields["weight_decay"],
            momentum=fields["momentum"],
            clip_norm=fields["clip_norm"],
            frozen=fields["frozen"],
        )
        mesh = distributed.make_mesh()
        # The step donates its state, and the detector's parameters are needed again.
        params = jax.tree.map(jnp.array, detector.params)
        state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
        self._state = jax.device_put(state, distributed.replicated(mesh))
        self._batch = distributed.put_batch(make_batch(TRAIN_IMAGES), mesh)
        self._step = compile_train_step(
            mesh,
            model=detector.model,
            optimizer=optimizer,
            schedule=lambda step: jnp.float32(LEARNING_RATE),
            seed=0,
            frozen=fields["frozen"],
        )

    def __call__(self) -> None:
        """Runs a step to its end; raises FloatingPointError where its loss is not finite."""
        self._state, scalars = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        if not np.isfinite(scalars["total_loss"]):
            raise FloatingPointError("the loss of the training step is not finite")


@functools.cache
def make_train_step(loss: str) -> TrainStep:
    """Returns the training step under a loss, which several measures share: it compiles for half a minute."""
    return TrainStep(make_detector(loss))


def make_eval_step(loss: str, *, suppression: str, voting: str) -> Callable[[], Any]:
    """Returns the eval step on one image: from the batch to the detections, run to its end."""
    detector = make_detector(loss)
    fields = detector.config.postprocess.to_dict() | {"suppression": suppression, "voting": voting}
    mesh = distributed.make_mesh()
    step = compile_eval_step(mesh, model=detector.model, settings={"": PostprocessSettings(**fields)})
    params = jax.device_put(detector.params, distributed.replicated(mesh))
    batch = distributed.put_batch(make_batch(1), mesh)
    return lambda: jax.block_until_ready(step(params, batch)[""])
