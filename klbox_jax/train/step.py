"""One step of training: a pure function, compiled once for each canvas."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from klbox_jax.distributed import batch_sharding, replicated
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.structures import Batch
from klbox_jax.train.optimizer import label_frozen
from klbox_jax.train.state import TrainState

# The initialisers become many small loops, each of which LLVM takes long to optimise and XLA runs once. At this level
# they are compiled in a third of the time and give the same bits; at level 0, which does not fuse multiplication and
# addition, they would not.
INIT_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}


def lower_create_state(
    model: GeneralizedRCNN, optimizer: optax.GradientTransformation, *, batch: Batch
) -> jax.stages.Lowered:
    """Returns the program, not yet compiled, from a random key to the `TrainState` of step 0.

    `batch` gives shapes alone. `out_info` of the result are the shapes of the state.
    """

    def init(key):
        params = model.init(key, batch, method="init_all_heads")["params"]
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return jax.jit(init).lower(jax.random.key(0))


def compile_and_create_state(lowered: jax.stages.Lowered, *, seed: int) -> TrainState:
    """Returns the `TrainState` of step 0 from the program of `lower_create_state`."""
    # Another platform may not know the option, and a level that was asked for by XLA_FLAGS stays.
    asked_for = any(name in os.environ.get("XLA_FLAGS", "") for name in INIT_COMPILER_OPTIONS)
    options = INIT_COMPILER_OPTIONS if jax.default_backend() == "cpu" and not asked_for else None
    return lowered.compile(options)(jax.random.key(seed))


def create_state(model: GeneralizedRCNN, optimizer: optax.GradientTransformation, *, batch: Batch, seed: int):
    """Returns the `TrainState` of step 0; `batch` gives shapes alone."""
    return compile_and_create_state(lower_create_state(model, optimizer, batch=batch), seed=seed)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: GeneralizedRCNN,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    frozen: tuple[str, ...] = (),
    skip_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the next state and the step's scalars.

    The random key is a function of the seed and the step alone, so that a resumed run draws what the
    uninterrupted one would have drawn. Parameters under the prefixes `frozen` get no gradient, so that
    nothing is computed for them on the way back. With `skip_nonfinite`, a step of which any scalar is not
    finite, the gradient's norm included, leaves parameters and optimizer as they are.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params):
        params = stop_frozen(params, frozen)
        outputs = model.apply({"params": params}, batch, key, state.step, method="train_forward")
        return sum(outputs.losses.values()), outputs

    (total, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    scalars = {
        "total_loss": total,
        **outputs.losses,
        **outputs.metrics,
        "learning_rate": jnp.asarray(schedule(state.step)),
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
        "update_norm": optax.tree.norm(updates),
    }
    if skip_nonfinite:
        finite = jnp.stack([jnp.isfinite(value) for value in scalars.values()]).all()
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), scalars


def stop_frozen(params, prefixes: tuple[str, ...]):
    """Returns the parameters with no gradient through those whose path begins with one of the prefixes."""
    labels = label_frozen(prefixes)(params)
    return jax.tree.map(lambda x, label: jax.lax.stop_gradient(x) if label == "frozen" else x, params, labels)


def compile_train_step(mesh: Mesh, **static) -> Callable:
    """Returns `train_step` jitted over the mesh: parameters on every device, the batch split among them.

    Losses are means over the global batch, so the compiler inserts the reductions across devices. The state
    is donated: its memory is reused for the next one.
    """

    def step(state, batch):
        return train_step(state, batch, **static)

    return jax.jit(
        step,
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=(replicated(mesh), replicated(mesh)),
        donate_argnums=0,
    )
