"""The state that training carries from step to step."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class TrainState:
    """The content of a checkpoint: arrays only, no functions.

    It also holds abstract states (`jax.ShapeDtypeStruct`) and shardings, so the shapes of its fields are not checked.

    Attributes:
        step: number of finished steps, each of one batch, int32 scalar.
        params: parameters of the model, a nested dictionary.
        opt_state: state of the optax transformation.
    """

    step: Any
    params: Any
    opt_state: Any
