"""The box loss chosen by name: the function that trains the edges, and the variance that the head's output means."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from klbox_jax.losses.box_regression import (
    kl_loss,
    kl_loss_note,
    kl_loss_piecewise,
    kl_variance_of,
    l1,
    smooth_l1,
)
from klbox_jax.losses.gaussian import beta_nll, direct_moment_matching, gaussian_kl, gaussian_nll
from klbox_jax.losses.label_noise import LABEL_NOISE
from klbox_jax.losses.laplace import laplace_nll, lasernet_kl
from klbox_jax.losses.sampled import energy_score


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """A box loss as a function of arrays, and what it needs.

    Attributes:
        function: `(deltas, targets, **fields)` without variances, else `(deltas, log_vars, targets, *needs, clamp=,
            **fields)`; elementwise, unreduced.
        has_variances: the head predicts a log variance for each edge.
        needs: further arrays, in order: `label_stds` (standard deviation of the label, coded), `key` (a random key).
        fields: pairs of a keyword of the function and the field of `BoxLoss` that it comes from.
        variance_factor: variance of the coded offset over `exp(alpha)`.
    """

    function: Callable[..., Array]
    has_variances: bool = True
    needs: tuple[str, ...] = ()
    fields: tuple[tuple[str, str], ...] = ()
    variance_factor: float = 1.0


# Each is described where it is defined. A user's own loss is added in the user's file, see docs/extend.md:
# `Extensions(box_losses=BOX_LOSSES | {"mine": LossFunction(mine)})`.
BOX_LOSSES = {
    "smooth_l1": LossFunction(smooth_l1, has_variances=False, fields=(("beta", "smooth_l1_beta"),)),
    "l1": LossFunction(l1, has_variances=False),
    "kl": LossFunction(kl_loss),
    "kl_piecewise": LossFunction(kl_loss_piecewise),
    "kl_note": LossFunction(kl_loss_note),
    "gaussian_nll": LossFunction(gaussian_nll),
    "laplace_nll": LossFunction(laplace_nll, variance_factor=2.0),
    "lasernet_kl": LossFunction(lasernet_kl, needs=("label_stds",), variance_factor=2.0),
    "gaussian_kl": LossFunction(gaussian_kl, needs=("label_stds",)),
    "energy_score": LossFunction(energy_score, needs=("key",), fields=(("num_samples", "num_samples"),)),
    "direct_moment_matching": LossFunction(direct_moment_matching, fields=(("beta", "smooth_l1_beta"),)),
    "beta_nll": LossFunction(beta_nll, fields=(("beta", "beta_nll_beta"),)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxLoss:
    """A box loss and its settings; static and hashable.

    Attributes:
        name: a key of `BOX_LOSSES`, or the name of `loss`.
        loss: the function; `BOX_LOSSES[name]` if None.
        log_var_clamp: range of the log variances (of `log b^2` for a Laplace loss).
        smooth_l1_beta: beta of `smooth_l1`, of both terms of `direct_moment_matching`, and of the smooth L1 that a ramp
            starts from. The KL losses have the paper's 1, the energy score the plain absolute error.
        beta_nll_beta: exponent of `beta_nll`, 0 to 1.
        num_samples: draws for each edge of `energy_score`. Harakeh and Waslander (2021) take 1000.
        label_noise: source of the label's standard deviation for `gaussian_kl` and `lasernet_kl`; see `label_stds`. The
            caller looks it up and codes it.
        label_noise_value: pixels for `"pixels"`, a share of the side below 1 for `"size"`.
        ramp_steps: steps over which a loss with variances takes over from smooth L1, as in probdet:
            `(1 - w) * smooth_l1 + w * loss`, `w = (100^t - 1) / 99`, `t = min(1, step / ramp_steps)`. 0 for none. A
            float is a share of the training, which `klbox_jax.train.schedules.with_ramp_in_steps` replaces by steps.
            Losses without variances ignore it.

    Raises:
        ValueError: a field has no meaning; the message names its config key and the allowed values.
    """

    name: str
    loss: LossFunction | None = None
    log_var_clamp: tuple[float, float] = (-7.0, 7.0)
    smooth_l1_beta: float = 1.0
    beta_nll_beta: float = 0.5
    num_samples: int = 100
    label_noise: str = "data"
    label_noise_value: float = 1.0
    ramp_steps: int | float = 0

    def __post_init__(self):
        if self.loss is None and self.name not in BOX_LOSSES:
            raise ValueError(
                f"config.model.box_loss = {self.name!r} is unknown; choose one of {', '.join(BOX_LOSSES)}"
            )
        if len(self.log_var_clamp) != 2 or not self.log_var_clamp[0] < self.log_var_clamp[1]:
            raise self._invalid("log_var_clamp", "needs two numbers, the lower first")
        if not self.smooth_l1_beta >= 0:
            raise self._invalid("smooth_l1_beta", "must be 0 or more")
        if not 0 <= self.beta_nll_beta <= 1:
            raise self._invalid("beta_nll_beta", "must be between 0 and 1")
        if self.num_samples < 1:
            raise self._invalid("num_samples", "must be 1 or more")
        if self.label_noise not in LABEL_NOISE:
            raise self._invalid("label_noise", f"is unknown; choose one of {', '.join(LABEL_NOISE)}")
        if not self.label_noise_value > 0:
            raise self._invalid("label_noise_value", "must be above 0")
        if self.label_noise == "size" and not self.label_noise_value < 1:
            raise self._invalid(
                "label_noise_value", "must be below 1: label_noise = 'size' takes a share of the side"
            )
        if self.ramp_steps < 0:
            raise self._invalid("ramp_steps", "must be 0 (no ramp) or more")

    def _invalid(self, field: str, reason: str) -> ValueError:
        value = getattr(self, field)
        return ValueError(f"config.model.box_loss_settings.{field} = {value!r} {reason}")

    @property
    def _entry(self) -> LossFunction:
        return self.loss or BOX_LOSSES[self.name]

    @property
    def has_variances(self) -> bool:
        """True if the head predicts a log variance for each edge."""
        return self._entry.has_variances

    @property
    def needs_label_stds(self) -> bool:
        """True if the label is a distribution too."""
        return "label_stds" in self._entry.needs

    def __call__(
        self,
        deltas: Float[Array, "..."],
        log_vars: Float[Array, "..."] | None,
        targets: Float[Array, "..."],
        *,
        label_stds: Float[Array, "..."] | None = None,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "..."]:
        """Returns the loss, elementwise and unreduced, including the ramp.

        Args:
            deltas: predicted coded offsets.
            log_vars: predicted alpha, same shape; not read by a loss without variances.
            targets: coded offsets of the matched ground truth, same shape.
            label_stds: coded standard deviations of the targets, same shape, if `needs_label_stds`.
            key: draws the noise of `energy_score`.
            step: training step, if there is a ramp.

        Returns:
            Same shape.

        Raises:
            ValueError: the shapes differ, or an array that this loss needs is None.
        """
        entry = self._entry
        fields = {keyword: getattr(self, field) for keyword, field in entry.fields}
        if not entry.has_variances:
            return entry.function(deltas, targets, **fields)
        available = {"log_vars": log_vars, "label_stds": label_stds, "key": key}
        needed = [self._require(name, available[name]) for name in ("log_vars", *entry.needs)]
        loss = entry.function(deltas, needed[0], targets, *needed[1:], clamp=self.log_var_clamp, **fields)
        if self.ramp_steps == 0:
            return loss
        if isinstance(self.ramp_steps, float):
            raise self._invalid("ramp_steps", "is a share of the training; give the loss a number of steps")
        self._require("step", step)
        weight = (100.0 ** jnp.minimum(step / self.ramp_steps, 1.0) - 1.0) / 99.0
        return (1.0 - weight) * smooth_l1(deltas, targets, beta=self.smooth_l1_beta) + weight * loss

    def _require(self, argument: str, value):
        if value is None:
            raise ValueError(f"The box loss {self.name!r} needs {argument}, got None.")
        return value

    def variance_of(self, log_vars: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the variance of the coded offsets that the head's output means, same shape.

        `exp(alpha)` of a Gaussian; `2 exp(alpha)` of a Laplace distribution, where `alpha = log b^2`. Alpha is clamped
        as in the loss.

        Raises:
            ValueError: this loss trains no variances.
        """
        if not self.has_variances:
            raise ValueError(f"The box loss {self.name!r} trains no variances.")
        variances = kl_variance_of(log_vars, clamp=self.log_var_clamp)
        factor = self._entry.variance_factor
        return variances if factor == 1.0 else factor * variances
