"""The optimizer and its learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import optax

REFERENCE_BATCH = 16


def build_optimizer(
    config: Any, *, batch_size: int, accumulate_steps: int, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns what a config describes, and the learning rate of each step.

    Args:
        config: a `config.optimizer`; its fields are arguments of `learning_rate_schedule` and `make_optimizer`.
        batch_size: images of a step, on all devices.
        accumulate_steps: steps of an update; the schedule counts updates, and its scaling their images.
        total_steps: steps of the whole training.
    """
    schedule = learning_rate_schedule(
        learning_rate=config.learning_rate,
        global_batch=batch_size * accumulate_steps,
        total_steps=total_steps // accumulate_steps,
        warmup_steps=config.warmup_steps,
        warmup_factor=config.warmup_factor,
        decay_at=config.decay_at,
        decay_factor=config.decay_factor,
    )
    optimizer = make_optimizer(
        name=config.name,
        schedule=schedule,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        clip_norm=config.clip_norm,
        frozen=config.frozen,
        accumulate_steps=accumulate_steps,
    )
    if accumulate_steps == 1:
        return optimizer, schedule
    return optimizer, lambda step: schedule(step // accumulate_steps)


def peak_learning_rate(learning_rate: float, *, images: int) -> float:
    """Returns the rate behind the warm-up, of updates of `images` images; `learning_rate` is that of 16."""
    return learning_rate * images / REFERENCE_BATCH


def learning_rate_schedule(
    *,
    learning_rate: float,
    global_batch: int,
    total_steps: int,
    warmup_steps: int,
    warmup_factor: float,
    decay_at: tuple[float, ...],
    decay_factor: float,
) -> optax.Schedule:
    """Linear warm-up, then a constant rate multiplied by `decay_factor` at shares `decay_at` of the run.

    `learning_rate` is the rate for 16 images an update; it is scaled linearly to `global_batch`, the images of
    an update (Goyal et al. 2017), so that a config keeps its meaning on another number of devices. All steps here
    are updates of the parameters.
    """
    peak = peak_learning_rate(learning_rate, images=global_batch)
    steps = optax.piecewise_constant_schedule(
        peak, {round(share * total_steps): decay_factor for share in decay_at}
    )

    def schedule(step):
        if not warmup_steps:
            return steps(step)
        progress = jax.numpy.minimum(step / warmup_steps, 1.0)
        return steps(step) * (warmup_factor + (1.0 - warmup_factor) * progress)

    return schedule


def make_optimizer(
    *,
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    momentum: float,
    clip_norm: float,
    frozen: tuple[str, ...],
    accumulate_steps: int = 1,
) -> optax.GradientTransformation:
    """Returns SGD with momentum or AdamW, with clipping and frozen parts.

    Args:
        name: `sgd` or `adamw`.
        schedule: learning rate of each update.
        weight_decay: on kernels alone; biases and normalization are left free.
        momentum: of SGD.
        clip_norm: largest norm of the whole gradient; 0 leaves it as it is.
        frozen: prefixes of parameter paths (`backbone/stem`) that are not trained. What is frozen has no part
            in the gradient's norm either.
        accumulate_steps: gradients to an update. Above 1, the parameters move by the mean of that many
            gradients; it is this mean that is clipped, and the updates that the schedule counts.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "sgd":
        # Decay enters before the momentum, as in the detectors of the literature.
        core = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=is_kernel), optax.sgd(schedule, momentum=momentum)
        )
    elif name == "adamw":
        core = optax.adamw(schedule, weight_decay=weight_decay, mask=is_kernel)
    else:
        raise ValueError(f"config.optimizer.name = {name!r} is unknown; choose adamw or sgd")
    if clip_norm:
        core = optax.chain(optax.clip_by_global_norm(clip_norm), core)
    if frozen:
        core = optax.multi_transform({"trained": core, "frozen": optax.set_to_zero()}, label_frozen(frozen))
    if accumulate_steps == 1:
        return core
    return optax.MultiSteps(core, accumulate_steps).gradient_transformation()


def is_kernel(params):
    """Marks the arrays that weight decay acts on: all with two axes or more."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def label_frozen(prefixes: tuple[str, ...]) -> Callable:
    """Returns a function that labels each parameter `frozen` or `trained` by its path."""

    def label(params):
        def one(path, _):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return "frozen" if any(name == p or name.startswith(p + "/") for p in prefixes) else "trained"

        return jax.tree_util.tree_map_with_path(one, params)

    return label
