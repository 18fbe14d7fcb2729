"""Lengths of warm-up, ramp and decay, which a config gives in steps or as shares of the training."""

from typing import Any

# A ramp that ends within this share of the training has hardly an effect, and neither has such a warm-up.
SHORT_RAMP, SHORT_WARMUP = 0.01, 0.0001
_RAMP = "model.box_loss_settings.ramp_steps"
_WARMUP = "optimizer.warmup_steps"


def to_steps(value: int | float, total: int, *, field: str) -> int:
    """Returns a number of steps.

    Args:
        value: a number of steps, or a share of the training as a float from 0.0 to 1.0.
        total: steps of the whole training.
        field: dotted name, for the message.

    Raises:
        ValueError: it is neither.
    """
    is_share = isinstance(value, float) and 0.0 <= value <= 1.0
    if is_share:
        return round(value * total)
    if isinstance(value, bool) or value < 0 or value != int(value):
        raise ValueError(
            f"config.{field} has {value}; give a whole number of steps, or a share of the training as a number from "
            "0.0 to 1.0"
        )
    return int(value)


def with_ramp_in_steps(config: Any, total_steps: int) -> Any:
    """Returns a `config.model` whose ramp is a number of steps; raises ValueError if it is no length."""
    given = config.box_loss_settings.get("ramp_steps", 0)
    steps = to_steps(given, total_steps, field=_RAMP)
    if type(given) is int:
        return config
    settings = dict(config.box_loss_settings) | {"ramp_steps": steps}
    return type(config)(dict(config.items()) | {"box_loss_settings": settings})


def find_unfit_lengths(config: Any, *, total_steps: int, has_variances: bool) -> list[str]:
    """Returns a sentence for each of warm-up, ramp and decay that never ends or begins, or that ends at once.

    Args:
        config: the whole config.
        total_steps: steps of the whole training, one batch each.
        has_variances: True if the box loss predicts variances; only then there is a ramp.
    """
    optimizer = config.optimizer
    updates = total_steps // config.train.accumulate_steps
    found = _judge(_WARMUP, "the warm-up", optimizer.warmup_steps, updates, short=SHORT_WARMUP)
    if has_variances:
        ramp = config.model.box_loss_settings.get("ramp_steps", 0)
        found += _judge(_RAMP, "the ramp of the box loss", ramp, total_steps, short=SHORT_RAMP)
    for value in optimizer.decay_at:
        steps = to_steps(value, updates, field="optimizer.decay_at")
        if steps > updates:
            found.append(
                f"config.optimizer.decay_at has step {steps}, but the training ends at step {updates}, so that the "
                "learning rate does not fall there; give a share of the training, such as 0.75"
            )
    return found


def _judge(field: str, what: str, value: int | float, total: int, *, short: float) -> list[str]:
    steps = to_steps(value, total, field=field)
    if value and steps < short * total:
        return [
            f"{what} ends after {steps} of {total} steps, almost at once; set config.{field} to a share of the "
            "training, such as 0.05, or to 0 for none"
        ]
    if steps >= total and steps:
        return [
            f"{what} takes {steps} steps and does not end within the {total} steps of the training; set config.{field} "
            "to a share of the training, such as 0.5"
        ]
    return []
