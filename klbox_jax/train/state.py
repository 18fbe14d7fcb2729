"""What training carries from step to step."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds: arrays only, no functions.

    Also the carrier of abstract states (`jax.ShapeDtypeStruct`) and shardings, so its fields are not
    checked for shapes.

    Attributes:
        step: number of finished steps, each of one batch, int32 scalar.
        params: the variables that `Module.apply` reads, a nested dictionary.
        opt_state: state of the optax transformation.
    """

    step: Any
    params: Any
    opt_state: Any
