"""Settings of post-processing: flat fields, as a config and the command line have them, and the methods they name."""

import dataclasses
import math

from klbox_jax.postprocess.fusion import BayesFusion
from klbox_jax.postprocess.greedy_suppression import Decay
from klbox_jax.postprocess.released_code import VARIANCE_ORDERS, VOTERS
from klbox_jax.postprocess.soft_nms import HardNMS, SoftNMS
from klbox_jax.postprocess.voting import (
    VARIANCE_MODES,
    BoxVoting,
    IoUVoting,
    VarianceVoting,
    VotingMethod,
)

SUPPRESSION_METHODS = ("hard", "soft_linear", "soft_gaussian", "iou_guided")
VOTING_METHODS = ("none", "variance", "variance_score", "iou", "iou_score", "box_voting", "wbf", "bayes")
# These make their own clusters from all candidates.
_OWN_CLUSTERS = ("wbf", "bayes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostprocessSettings:
    """Everything that turns predictions into detections; hashable, so it can be a static argument of `jax.jit`.

    `voters`, `voting_iou_floor`, `variance_order` and `plus_one_widths` copy habits of the KL-Loss release that differ
    from the paper (see `released_code`). `legacy=detectron` of a config sets them all.

    Attributes:
        suppression: `hard`, `soft_linear`, `soft_gaussian`, or `iou_guided` with an IoU head. A user's own greedy
            suppression is passed as a value instead of a name: any hashable `Decay`.
        voting: `none`; `variance` (He et al. 2019), `variance_score` or `bayes` (BayesOD) for a head that predicts
            variances; `iou`, `iou_score`, `box_voting` (MR-CNN) or `wbf` (weighted boxes fusion) for any head. A user's
            own voting is passed as a value instead of a name: any hashable `VotingMethod`.
        sigma_t: width of the IoU weight in `variance`, `variance_score`, `iou` and `iou_score`.
        voters: `all` candidates of the class, as in the paper's Algorithm 1, or the `remaining` ones, as in the
            release: those that suppression has neither picked nor dropped before this pick.
        voting_iou_floor: IoU above which a candidate votes, in the methods that use `sigma_t`.
        variance_order: `corners` divides each edge by its own variance in `variance` and `variance_score`;
            `detectron` divides y1 by the variance of x2 and x2 by that of y1, as the release does: its outputs are
            ordered x1, x2, y1, y2 and its boxes x1, y1, x2, y2. `box_stds` keep their own edges in both cases.
        voting_variance: meaning of `box_stds` after voting: `average`, `fused` or `winner` (see `voting`). That of
            `bayes` is fused by definition.
        box_voting_threshold: IoU from which a candidate votes in `box_voting`.
        wbf_threshold: IoU above which a candidate joins a cluster of `wbf`.
        bayes_affinity: IoU above which a candidate is fused by `bayes`.
        bayes_calibration: factor on the variance that `bayes` returns.
        nms_threshold: IoU above which `hard` and `iou_guided` remove a box.
        soft_nms_sigma: width of the decay of `soft_gaussian`.
        soft_nms_threshold: IoU from which `soft_linear` decays.
        score_threshold: a candidate has a class probability above this.
        soft_nms_min_score: the soft methods drop a box whose score falls below this.
        refine_steps: rounds of the IoU head's gradient ascent on each detection; 0 for none.
        refine_step_size: step size of the ascent, lambda of `refine_boxes`.
        refine_keep_best: return the best box of the ascent instead of the last.
        score_by_iou: multiply each score by the predicted IoU.
        score_by_std: multiply each score by exp(-score_by_std * u), where u is the mean over the four edges of std /
            side of the returned box; 0 for none. An edge that is off by a small share of its side lowers the IoU by
            about that share. So the expected IoU falls about linearly in u, and to first order the better placed boxes
            come first, as average precision wants.
        flip: add the candidates of the mirrored image to those of the image, for twice the time of the network.
            `candidate_index` then counts into both, the mirrored image's last, and `pre_nms_topk` should be twice as
            large.
        pre_nms_topk: candidates of an image, over all classes, before suppression.
        detections_per_image: slots of the result.
        plus_one_widths: for a network trained with boxes of whole pixels, x2 - x1 + 1 wide, as in Detectron. Boxes here
            end where their last pixel ends, so offsets and IoUs are the same without the 1. Two effects are left: the
            last pixel is one of the file, not of the canvas, once boxes leave the network, and a box outside the image
            keeps its nearest pixel.

    Raises:
        ValueError: naming the field and what it may be.
    """

    suppression: str | Decay = "hard"
    voting: str | VotingMethod = "none"
    sigma_t: float = 0.02
    voters: str = "all"
    voting_iou_floor: float = 0.0
    variance_order: str = "corners"
    voting_variance: str = "average"
    box_voting_threshold: float = 0.5
    wbf_threshold: float = 0.55
    bayes_affinity: float = 0.7
    bayes_calibration: float = 1.0
    nms_threshold: float = 0.5
    soft_nms_sigma: float = 0.5
    soft_nms_threshold: float = 0.3
    score_threshold: float = 0.05
    soft_nms_min_score: float = 0.001
    refine_steps: int = 0
    refine_step_size: float = 0.5
    refine_keep_best: bool = False
    score_by_iou: bool = False
    score_by_std: float = 0.0
    flip: bool = False
    pre_nms_topk: int = 1000
    detections_per_image: int = 100
    plus_one_widths: bool = False

    def __post_init__(self):
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    def _check_choices(self) -> None:
        choices = {
            "suppression": SUPPRESSION_METHODS,
            "voting": VOTING_METHODS,
            "voting_variance": VARIANCE_MODES,
            "voters": VOTERS,
            "variance_order": VARIANCE_ORDERS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            is_own_method = name in ("suppression", "voting") and callable(value)
            if value not in known and not is_own_method:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("threshold", "min_score", "affinity")) and not 0 <= value <= 1:
                raise ValueError(f"{field.name} must lie in [0, 1]; got {value!r}.")
        if not 0 <= self.voting_iou_floor < 1:
            raise ValueError(
                f"voting_iou_floor must be from 0 to below 1, or no box would vote; got {self.voting_iou_floor!r}."
            )
        if not 0 <= self.score_by_std < math.inf:
            raise ValueError(f"score_by_std must be 0, or positive and finite; got {self.score_by_std!r}.")
        if self.bayes_affinity == 1:
            raise ValueError(
                "bayes_affinity must be below 1: no IoU is above it, and nothing would be fused."
            )
        for name in ("sigma_t", "soft_nms_sigma", "bayes_calibration", "refine_step_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)!r}.")
        for name in ("pre_nms_topk", "detections_per_image"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive integer; got {getattr(self, name)!r}.")
        if not (isinstance(self.refine_steps, int) and self.refine_steps >= 0):
            raise ValueError(f"refine_steps must be 0 or a positive integer; got {self.refine_steps!r}.")

    def _check_combinations(self) -> None:
        if self.voters == "remaining" and self.suppression == "iou_guided":
            raise ValueError(
                "voters='remaining' needs to know what each pick left in the queue, and suppression='iou_guided' does "
                "not pick one by one: set suppression to hard, soft_linear or soft_gaussian, or voters to all."
            )
        if self.voters == "remaining" and self.voting in _OWN_CLUSTERS:
            raise ValueError(
                f"voters='remaining' leaves candidates out of a vote, and voting={self.voting!r} makes clusters of "
                "all of them: set voting to variance, variance_score, iou, iou_score or box_voting, or voters to all."
            )
        if self.variance_order == "detectron" and self.voting == "bayes":
            raise ValueError(
                "variance_order='detectron' is an order of voting='variance', and voting='bayes' has none: set "
                "voting to variance, or variance_order to corners."
            )
        if self.flip and self.plus_one_widths:
            raise ValueError(
                "flip=True mirrors edges, and plus_one_widths=True decodes whole pixels, whose first and last are not "
                "each other's mirror image: set one of them to False."
            )

    def to_dict(self) -> dict[str, str | float | int | bool]:
        """Returns the fields as plain values for JSON; a user's own method as its `repr`."""
        fields = vars(self).items()
        return {name: repr(value) if callable(value) else value for name, value in fields}

    @property
    def decay(self) -> Decay:
        """The factor on overlapping boxes' scores that greedy suppression applies.

        Raises:
            ValueError: `iou_guided` has none.
        """
        match self.suppression:
            case "hard":
                return HardNMS(iou_threshold=self.nms_threshold)
            case "soft_linear" | "soft_gaussian":
                return SoftNMS(
                    method=self.suppression.removeprefix("soft_"),
                    sigma=self.soft_nms_sigma,
                    iou_threshold=self.soft_nms_threshold,
                    min_score=self.soft_nms_min_score,
                )
            case "iou_guided":
                raise ValueError("suppression='iou_guided' ranks by predicted IoU and decays no score.")
            case own:
                return own

    @property
    def voting_method(self) -> VotingMethod | None:
        """The weights of the vote, None where boxes stay as they are (`none`, and `wbf`, which averages earlier)."""
        width = {"sigma_t": self.sigma_t, "iou_floor": self.voting_iou_floor}
        match self.voting:
            case "none" | "wbf":
                return None
            case "variance" | "variance_score":
                by_score = self.voting == "variance_score"
                return VarianceVoting(by_score=by_score, variance_order=self.variance_order, **width)
            case "iou" | "iou_score":
                return IoUVoting(by_score=self.voting == "iou_score", **width)
            case "box_voting":
                return BoxVoting(iou_threshold=self.box_voting_threshold)
            case "bayes":
                return BayesFusion(affinity=self.bayes_affinity, calibration=self.bayes_calibration)
            case own:
                return own

    @property
    def variance_mode(self) -> str:
        """Meaning of the variance after voting, one of `VARIANCE_MODES`."""
        return "fused" if self.voting == "bayes" else self.voting_variance

    @property
    def needs_predicted_ious(self) -> bool:
        """True if an IoU head is needed."""
        return self.suppression == "iou_guided" or self.refine_steps > 0 or self.score_by_iou

    def check_head(self, *, has_variances: bool, has_iou_head: bool) -> None:
        """Raises ValueError, with the field to change, if the settings need an output that the head does not have."""
        if getattr(self.voting_method, "needs_variances", False) and not has_variances:
            raise ValueError(
                f"voting={self.voting!r} needs box_log_vars, which this head does not predict: set "
                "config.model.box_loss to a loss with variances (such as kl) and train with it, or set "
                "config.postprocess.voting to none, iou, iou_score, box_voting or wbf."
            )
        if self.score_by_std and not has_variances:
            raise ValueError(
                f"score_by_std={self.score_by_std!r} needs box_log_vars, which this head does not predict: set "
                "config.model.box_loss to a loss with variances (such as kl) and train with it, or set "
                "config.postprocess.score_by_std to 0."
            )
        if self.needs_predicted_ious and not has_iou_head:
            field = (
                "suppression='iou_guided'"
                if self.suppression == "iou_guided"
                else f"refine_steps={self.refine_steps}"
                if self.refine_steps
                else "score_by_iou=True"
            )
            raise ValueError(
                f"{field} needs an IoU head, which this model does not have: set "
                "config.model.iou_head.enabled=True and train with it, or choose another "
                f"config.postprocess.{field.split('=')[0]}."
            )
