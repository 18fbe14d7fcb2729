"""One step of training: a pure function, compiled once for each canvas."""

import dataclasses
import os
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from klbox_jax.compilation import CountedJit, give_back_freed_memory
from klbox_jax.distributed import batch_sharding, replicated
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.structures import Batch
from klbox_jax.train.optimizer import label_frozen
from klbox_jax.train.state import TrainState

# The initializers become many small loops. LLVM takes long to optimize each of them, and XLA runs each once. At this
# level they compile in a third of the time and give the same bits. At level 0, which does not fuse multiplication and
# addition, they would not.
INIT_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}


def lower_create_state(
    model: GeneralizedRCNN, optimizer: optax.GradientTransformation, *, batch: Batch
) -> jax.stages.Lowered:
    """Returns the program, not yet compiled, from a random key to the `TrainState` of step 0.

    `batch` gives only shapes. `out_info` of the result has the shapes of the state.
    """

    def init(key):
        params = model.init(key, batch, method="init_all_heads")["params"]
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return jax.jit(init).lower(jax.random.key(0))


def compile_and_create_state(lowered: jax.stages.Lowered, *, seed: int) -> TrainState:
    """Returns the `TrainState` of step 0 from the program of `lower_create_state`."""
    # Another platform may not know the option, and a level that XLA_FLAGS sets is kept.
    is_set_by_user = any(name in os.environ.get("XLA_FLAGS", "") for name in INIT_COMPILER_OPTIONS)
    options = INIT_COMPILER_OPTIONS if jax.default_backend() == "cpu" and not is_set_by_user else None
    return lowered.compile(options)(jax.random.key(seed))


def create_state(model: GeneralizedRCNN, optimizer: optax.GradientTransformation, *, batch: Batch, seed: int):
    """Returns the `TrainState` of step 0; `batch` gives only shapes."""
    return compile_and_create_state(lower_create_state(model, optimizer, batch=batch), seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Computes one training step; a pure function of the state and a batch.

    The random key depends only on the seed and the step number, so that a resumed run draws the same numbers as an
    uninterrupted one.

    Attributes:
        model: the detector.
        optimizer: of `build_optimizer`.
        schedule: learning rate of each step, for the metrics.
        seed: of the random key.
        frozen: prefixes of parameter paths that get no gradient, so that the backward pass skips them.
        skip_nonfinite: leave parameters and optimizer state unchanged if a metric of the step is not finite; the norm
            of the gradient is one of them.
    """

    model: GeneralizedRCNN
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int
    frozen: tuple[str, ...] = ()
    skip_nonfinite: bool = False

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the next state and the metrics of the step, scalars by name."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        def loss_fn(params):
            params = stop_frozen(params, self.frozen)
            outputs = self.model.apply({"params": params}, batch, key, state.step, method="train_forward")
            return sum(outputs.losses.values()), outputs

        (total, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        scalars = {
            "total_loss": total,
            **outputs.losses,
            **outputs.metrics,
            "learning_rate": jnp.asarray(self.schedule(state.step)),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        if self.skip_nonfinite:
            finite = jnp.stack([jnp.isfinite(value) for value in scalars.values()]).all()
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), scalars


def stop_frozen(params, prefixes: tuple[str, ...]):
    """Returns the parameters, without gradient through those whose path begins with one of the prefixes."""
    labels = label_frozen(prefixes)(params)
    return jax.tree.map(lambda x, label: jax.lax.stop_gradient(x) if label == "frozen" else x, params, labels)


class CompiledTrainStep:
    """A `TrainStep` jitted over a mesh: parameters on every device, the batch split among them.

    It compiles once for each canvas. Losses are means over the global batch, so the compiler inserts the reductions
    across devices. The state is donated: its memory is reused for the next one.
    """

    def __init__(self, mesh: Mesh, train_step: TrainStep):
        """Takes the devices and the step; compiles nothing yet."""

        def step(state, batch):
            return train_step(state, batch)

        self._step = CountedJit(
            step,
            in_shardings=(replicated(mesh), batch_sharding(mesh)),
            out_shardings=(replicated(mesh), replicated(mesh)),
            donate_argnums=0,
        )
        self._compiling: Future | None = None
        self._num_traces_before = 0

    @property
    def num_traces(self) -> int:
        """The number of traces so far, one for each canvas."""
        return self._step.num_traces

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Returns the program, not yet compiled, for a state and a batch, or their shapes."""
        return self._step.lower(state, batch)

    def compile_ahead(self, state: TrainState, batch: Batch, *, executor: Executor) -> None:
        """Traces the step now and compiles it on a thread of `executor`; the next call waits for it.

        Args:
            state: shapes of the state (`jax.ShapeDtypeStruct`), with shardings.
            batch: a batch of the shapes of the next step.
            executor: runs the compiler.
        """
        self._compiling = executor.submit(self.lower(state, batch).compile)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """Runs the step; see `TrainStep`. Returns while the devices still work on it."""
        if self._compiling is not None:
            compiling, self._compiling = self._compiling, None
            compiling.result()
        results = self._step(state, batch)
        if self.num_traces > self._num_traces_before:
            self._num_traces_before = self.num_traces
            give_back_freed_memory()
        return results


def compile_train_step(mesh: Mesh, **fields: Any) -> CompiledTrainStep:
    """Returns the `TrainStep` with these fields, jitted over the mesh."""
    return CompiledTrainStep(mesh, TrainStep(**fields))
