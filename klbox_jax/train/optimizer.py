"""The optimizer and its learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from klbox_jax.train.schedules import to_steps

# `config.optimizer.learning_rate` is the rate for updates of this many images.
REFERENCE_BATCH = 16


def build_optimizer(
    config: Any, *, batch_size: int, accumulate_steps: int, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer of a config and the learning rate of each step.

    Args:
        config: a `config.optimizer`; its fields are arguments of `learning_rate_schedule` and `make_optimizer`.
            `warmup_steps` may be a share of the training.
        batch_size: images in one step, over all devices.
        accumulate_steps: steps in one update of the parameters. The schedule counts updates, and the learning rate
            scales with the images of one update.
        total_steps: steps of the whole training.
    """
    schedule = learning_rate_schedule(
        peak_learning_rate(config.learning_rate, images=batch_size * accumulate_steps),
        total_steps=total_steps // accumulate_steps,
        warmup_steps=to_steps(
            config.warmup_steps, total_steps // accumulate_steps, field="optimizer.warmup_steps"
        ),
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
    )
    if accumulate_steps == 1:
        return optimizer, schedule
    return accumulate_gradients(optimizer, accumulate_steps), lambda step: schedule(step // accumulate_steps)


def peak_learning_rate(learning_rate: float, *, images: int) -> float:
    """Returns the learning rate after the warm-up, scaled linearly to updates of `images` images.

    `learning_rate` is the rate for 16 images (linear scaling rule, Goyal et al. 2017), so that a config keeps its
    meaning on another number of devices.
    """
    return learning_rate * images / REFERENCE_BATCH


def learning_rate_schedule(
    peak: float,
    *,
    total_steps: int,
    warmup_steps: int,
    warmup_factor: float,
    decay_at: tuple[float | int, ...],
    decay_factor: float,
) -> optax.Schedule:
    """Returns a schedule with linear warm-up and step decay; its steps are updates of the parameters.

    Args:
        peak: learning rate after the warm-up.
        total_steps: updates of the whole training.
        warmup_steps: updates of the warm-up; 0 for none.
        warmup_factor: share of the rate at which the warm-up starts.
        decay_at: shares of the training, or updates; after each of them the rate is multiplied by `decay_factor`.
        decay_factor: factor of each decay.
    """
    falls = [to_steps(value, total_steps, field="optimizer.decay_at") for value in decay_at]
    steps = optax.piecewise_constant_schedule(peak, dict.fromkeys(falls, decay_factor))

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
) -> optax.GradientTransformation:
    """Returns SGD with momentum or AdamW, with gradient clipping and frozen parameters.

    Args:
        name: `sgd` or `adamw`.
        schedule: learning rate of each update.
        weight_decay: decay of the kernels; biases and normalization parameters have none.
        momentum: momentum of SGD; AdamW does not use it.
        clip_norm: largest norm of the whole gradient; 0 turns clipping off.
        frozen: prefixes of parameter paths (`backbone/stem`) that are not trained. Frozen parameters do not count in
            the norm of the gradient either.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "sgd":
        # Decay enters before the momentum, like in published detectors.
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
    return core


def accumulate_gradients(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Returns an optimizer that updates the parameters every `steps` steps, by the mean of their gradients.

    Clipping acts on this mean, and the schedule of `optimizer` counts updates.
    """
    return optax.MultiSteps(optimizer, steps).gradient_transformation()


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
