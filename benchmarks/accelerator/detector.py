"""Our detector in one precision: the network, its parameters, and its compiled steps for one device."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from benchmarks.accelerator.batch import make_images
from benchmarks.accelerator.network import NETWORKS, Network
from benchmarks.steps import param_shapes, random_params
from klbox_jax.evaluation.eval_step import compile_eval_step
from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch
from klbox_jax.train.optimizer import make_optimizer
from klbox_jax.train.state import TrainState
from klbox_jax.train.step import compile_train_step


@dataclasses.dataclass(frozen=True)
class Precision:
    """Arithmetic of a program.

    Attributes:
        dtype: `config.model.dtype`.
        matmul: `jax.default_matmul_precision` of float32 products.
    """

    dtype: str
    matmul: str


# JAX's default for float32 products is TF32 on GPUs that have it, bfloat16 on TPUs, and float32 on CPUs.
PRECISIONS = {
    "float32": Precision("float32", "highest"),
    "tf32": Precision("float32", "default"),
    "bfloat16": Precision("bfloat16", "default"),
}


class Fields(dict):
    """A dictionary whose entries are attributes too, as `build_model` reads a ConfigDict."""

    def __getattr__(self, name: str) -> Any:
        """Returns the entry of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the network has no field {name!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain dictionary."""
        return dict(self)


def as_fields(value: Any) -> Any:
    """Returns nested dictionaries as nested `Fields`; other values stay as they are."""
    if isinstance(value, Mapping):
        return Fields({name: as_fields(entry) for name, entry in value.items()})
    return value


def single_device_mesh(device: jax.Device) -> Mesh:
    """Returns the mesh of one device, with the axis `data`."""
    return jax.make_mesh((1,), ("data",), devices=[device], axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Detector:
    """A detector whose steps run on one device.

    Attributes:
        network: its numbers.
        precision: key of `PRECISIONS`.
        canvas: height and width of the images.
        device: runs the steps.
        params: its parameters, on the host; see `benchmarks.steps.random_params`.
    """

    network: Network
    precision: str
    canvas: tuple[int, int]
    device: jax.Device
    params: dict[str, Any]

    @property
    def model(self) -> GeneralizedRCNN:
        """The Flax module."""
        return build_network(self.network, PRECISIONS[self.precision].dtype)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the device alone."""
        return single_device_mesh(self.device)

    def settings(self, **changes: Any) -> PostprocessSettings:
        """Returns the settings of the post-processing, with these changes."""
        return PostprocessSettings(**(dict(self.network.postprocess) | changes))

    def batch(self, num_images: int) -> Batch:
        """Returns a synthetic batch, on the host."""
        return make_images(num_images, self.canvas, num_classes=self.network.num_classes)

    def first_state(self) -> TrainState:
        """Returns the state before the first training step, on the host."""
        # The state of a new optimizer is all zeros: counters, momenta and moments.
        shapes = jax.eval_shape(self._optimizer(0.0).init, self.params)
        opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return TrainState(step=np.zeros((), np.int32), params=self.params, opt_state=opt_state)

    def first_state_on_device(self) -> TrainState:
        """Returns a copy of `first_state` on the device: the training step reuses the memory of its state."""
        return jax.device_put(self.first_state(), self.device, may_alias=False)

    def lower_train_step(self, num_images: int, *, learning_rate: float) -> jax.stages.Lowered:
        """Returns the training step with a constant learning rate, not yet compiled."""
        step = compile_train_step(
            self.mesh,
            model=self.model,
            optimizer=self._optimizer(learning_rate),
            schedule=lambda step: jnp.float32(learning_rate),
            seed=0,
            frozen=self.network.optimizer["frozen"],
        )
        with jax.default_matmul_precision(PRECISIONS[self.precision].matmul):
            return step.lower(self.first_state(), self.batch(num_images))

    def lower_eval_step(self, num_images: int, **changes: Any) -> jax.stages.Lowered:
        """Returns the eval step, not yet compiled; `changes` are of the settings of the post-processing."""
        step = compile_eval_step(self.mesh, model=self.model, settings={"": self.settings(**changes)})
        with jax.default_matmul_precision(PRECISIONS[self.precision].matmul):
            return step.lower(self.params, self.batch(num_images))

    def _optimizer(self, learning_rate: float) -> optax.GradientTransformation:
        return make_optimizer(schedule=lambda step: jnp.float32(learning_rate), **self.network.optimizer)


def make_detector(
    name: str, precision: str, canvas: tuple[int, int], device: jax.Device, **changes: Any
) -> Detector:
    """Returns the detector of that name in `NETWORKS`.

    Args:
        name: key of `NETWORKS`.
        precision: key of `PRECISIONS`.
        canvas: height and width of the images.
        device: runs the steps.
        **changes: of groups of the model that have no parameters, such as `roi_heads={"batch_size_per_image": 64}`.
    """
    network = NETWORKS[name]
    model = dict(network.model) | {
        group: dict(network.model[group]) | values for group, values in changes.items()
    }
    network = dataclasses.replace(network, model=model)
    return Detector(network, precision, canvas, device, params_of(name))


def build_network(network: Network, dtype: str) -> GeneralizedRCNN:
    """Returns the Flax module of a network."""
    return build_model(as_fields(dict(network.model) | {"dtype": dtype}), num_classes=network.num_classes)


@functools.cache
def params_of(name: str) -> dict[str, Any]:
    """Returns the random parameters of a network; they depend on neither canvas nor precision."""
    network = NETWORKS[name]
    model, batch = (
        build_network(network, "float32"),
        make_images(1, (64, 64), num_classes=network.num_classes),
    )
    return random_params(param_shapes(model, batch), network.param_factors)
