"""Defaults of `klbox train` for a user's own data: images to calibrate on, and the length of the ramp."""

from collections.abc import Callable, Sequence
from typing import Any

from klbox_jax.config.overrides import apply_overrides

Fields = Sequence[tuple[str, str | None]]
_RAMP = "model.box_loss_settings.ramp_steps"


def set_defaults(config: Any, fields: Fields, *, calibrates: bool, say: Callable[[str], None]) -> bool:
    """Sets the fields of a first training on own data, and says each in one line; returns True if images are held out.

    Own data are those of a folder, unless the split is that of a published set, which has a year in its name: a paper's
    table needs all of its images and its own schedule.

    Args:
        config: the whole config, changed in place.
        fields: the fields of the command line, which hold.
        calibrates: True if the training ends with a calibration.
        say: prints a line.
    """
    data = config.data
    has_sigma = config.model.box_loss not in ("smooth_l1", "l1")
    if data.name == "scenes" or _is_published(data.train_split) or not has_sigma:
        return False
    ramp = config.model.box_loss_settings.get("ramp_steps", 0)
    if type(ramp) is int and ramp > 0 and not _is_said(_RAMP, fields):
        _set_ramp(config, 0.75)
        say(
            "klbox train: the box loss takes over from smooth L1 in three quarters of the training "
            f"(config.{_RAMP} = 0.75)"
        )
    if not calibrates or _says_hold_out(config, fields):
        return False
    data.hold_out = 0.1
    say(
        "klbox train: a tenth of the training images is kept out to calibrate sigma on (config.data.hold_out = 0.1; "
        "--config.data.hold_out=0 trains on all)"
    )
    return True


def repeat_defaults(config: Any, fields: Fields, stored: Any) -> None:
    """Sets in a config what `set_defaults` set at the first start of a run, whose config is `stored`."""
    if not _says_hold_out(config, fields):
        config.data.hold_out = stored.data.get("hold_out", 0.0)
    ramp = stored.model.get("box_loss_settings", {}).get("ramp_steps", 0)
    if isinstance(ramp, float) and not _is_said(_RAMP, fields):
        _set_ramp(config, ramp)


def _set_ramp(config: Any, share: float) -> None:
    apply_overrides(config, [(_RAMP, repr(share))])


def _is_said(name: str, fields: Fields) -> bool:
    return any(name == said for said, _ in fields)


def _says_hold_out(config: Any, fields: Fields) -> bool:
    """Returns True if the command line or the config says which images sigma is calibrated on, or that none are."""
    said = any(_is_said(f"data.{name}", fields) for name in ("hold_out", "calibration_split"))
    return said or bool(config.data.hold_out or config.data.calibration_split)


def _is_published(split: str) -> bool:
    """Returns True for a split with a year in its name, such as train2017 or 2007_trainval."""
    numbers = "".join(c if c.isdigit() else " " for c in split).split()
    return any(len(number) == 4 for number in numbers)
