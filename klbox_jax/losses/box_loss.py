"""The box loss chosen by name: what trains the edges, and what variance the head's output stands for."""

import dataclasses

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

BOX_LOSSES = (
    "smooth_l1",
    "l1",
    "kl",
    "kl_piecewise",
    "kl_note",
    "gaussian_nll",
    "laplace_nll",
    "lasernet_kl",
    "gaussian_kl",
    "energy_score",
    "direct_moment_matching",
    "beta_nll",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxLoss:
    """A box loss and its settings; static and hashable.

    Attributes:
        name: one of `BOX_LOSSES`; each is described where it is defined.
        log_var_clamp: range of the log-variances (of `log b^2` for a Laplace loss).
        smooth_l1_beta: of `smooth_l1`, of both terms of `direct_moment_matching`, and of the smooth L1 that a
            ramp starts from. The KL losses have the paper's 1, the energy score the plain absolute error.
        beta_nll_beta: exponent of `beta_nll`, 0 to 1.
        num_samples: draws for each edge of `energy_score`. Harakeh and Waslander (2021) take 1000.
        label_noise: where `gaussian_kl` and `lasernet_kl` have the label's standard deviation from; see
            `label_stds`. The caller looks it up and codes it.
        label_noise_value: pixels for `"pixels"`, a share of the side below 1 for `"size"`.
        ramp_steps: steps over which a loss with variances takes over from smooth L1, as in probdet:
            `(1 - w) * smooth_l1 + w * loss`, `w = (100^t - 1) / 99`, `t = min(1, step / ramp_steps)`.
            0 for none. `smooth_l1` and `l1` ignore it.

    Raises:
        ValueError: a field has no meaning; the message names its config key and what it may be.
    """

    name: str
    log_var_clamp: tuple[float, float] = (-7.0, 7.0)
    smooth_l1_beta: float = 1.0
    beta_nll_beta: float = 0.5
    num_samples: int = 100
    label_noise: str = "data"
    label_noise_value: float = 1.0
    ramp_steps: int = 0

    def __post_init__(self):
        if self.name not in BOX_LOSSES:
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
    def has_variances(self) -> bool:
        """Whether the head needs a log-variance for each edge."""
        return self.name not in ("smooth_l1", "l1")

    @property
    def needs_label_stds(self) -> bool:
        """Whether the label is a distribution too."""
        return self.name in ("lasernet_kl", "gaussian_kl")

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
        """The loss, elementwise and unreduced, ramp included.

        Args:
            deltas: predicted coded offsets.
            log_vars: predicted alpha, same shape; not read by a loss without variances.
            targets: coded offsets of the matched ground truth, same shape.
            label_stds: coded standard deviations of the targets, same shape, if `needs_label_stds`.
            key: draws the noise of `energy_score`.
            step: of the training, if there is a ramp.

        Returns:
            Same shape.

        Raises:
            ValueError: the shapes differ, or what this loss needs is None.
        """
        if self.name == "smooth_l1":
            return smooth_l1(deltas, targets, beta=self.smooth_l1_beta)
        if self.name == "l1":
            return l1(deltas, targets)
        self._require("log_vars", log_vars)
        loss = self._probabilistic(deltas, log_vars, targets, label_stds, key)
        if self.ramp_steps == 0:
            return loss
        self._require("step", step)
        weight = (100.0 ** jnp.minimum(step / self.ramp_steps, 1.0) - 1.0) / 99.0
        return (1.0 - weight) * smooth_l1(deltas, targets, beta=self.smooth_l1_beta) + weight * loss

    def _probabilistic(self, deltas, log_vars, targets, label_stds, key):
        clamp = self.log_var_clamp
        match self.name:
            case "kl":
                return kl_loss(deltas, log_vars, targets, clamp=clamp)
            case "kl_piecewise":
                return kl_loss_piecewise(deltas, log_vars, targets, clamp=clamp)
            case "kl_note":
                return kl_loss_note(deltas, log_vars, targets, clamp=clamp)
            case "gaussian_nll":
                return gaussian_nll(deltas, log_vars, targets, clamp=clamp)
            case "laplace_nll":
                return laplace_nll(deltas, log_vars, targets, clamp=clamp)
            case "lasernet_kl":
                self._require("label_stds", label_stds)
                return lasernet_kl(deltas, log_vars, targets, label_stds, clamp=clamp)
            case "gaussian_kl":
                self._require("label_stds", label_stds)
                return gaussian_kl(deltas, log_vars, targets, label_stds, clamp=clamp)
            case "energy_score":
                self._require("key", key)
                return energy_score(deltas, log_vars, targets, key, num_samples=self.num_samples, clamp=clamp)
            case "direct_moment_matching":
                return direct_moment_matching(
                    deltas, log_vars, targets, beta=self.smooth_l1_beta, clamp=clamp
                )
            case "beta_nll":
                return beta_nll(deltas, log_vars, targets, beta=self.beta_nll_beta, clamp=clamp)

    def _require(self, argument: str, value) -> None:
        if value is None:
            raise ValueError(f"The box loss {self.name!r} needs {argument}, got None.")

    def variance_of(self, log_vars: Float[Array, "..."]) -> Float[Array, "..."]:
        """The variance of the coded offsets that the head's output stands for, same shape.

        `exp(alpha)` of a Gaussian; `2 exp(alpha)` of a Laplace distribution, where `alpha = log b^2`. Alpha
        is clamped as in the loss.

        Raises:
            ValueError: this loss trains no variances.
        """
        if not self.has_variances:
            raise ValueError(f"The box loss {self.name!r} trains no variances.")
        variances = kl_variance_of(log_vars, clamp=self.log_var_clamp)
        return 2.0 * variances if self.name in ("laplace_nll", "lasernet_kl") else variances
