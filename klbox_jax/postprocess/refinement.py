"""Optimization-based box refinement (Jiang et al., IoU-Net, ECCV 2018): boxes climb their predicted IoU."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class RefinementResult:
    """Refined boxes, each with the IoU predicted for it there."""

    boxes: Float[AnyArray, "*b D 4"]
    predicted_ious: Float[AnyArray, "*b D"]


def refine_boxes(
    boxes: Float[Array, "D 4"],
    predict_iou: Callable[[Float[Array, "D 4"]], Float[Array, " D"]],
    *,
    num_steps: int = 5,
    step_size: float = 0.5,
    early_stop: float = 0.001,
    degeneration_tolerance: float = -0.01,
    keep_best: bool = False,
) -> RefinementResult:
    """Moves each box up the gradient of its predicted IoU, a fixed number of steps at most.

    The paper's Algorithm 2. A step adds `step_size * gradient * (w, h, w, h)`, w and h being the box's present
    sides. After a step a box stops for good where the prediction changed by less than `early_stop`, or changed
    by less than `degeneration_tolerance`, which is negative: where it fell by more than that. The step that
    made it stop is not taken back, in the paper as in the reimplementation (thisisi3/OpenMMLab-IoUNet), so a
    box may end below its start; `keep_best` gives the best place on its way instead, and no prediction is ever
    lowered.

    Args:
        boxes: in pixels. Boxes without area stay where they are. Nothing is clipped.
        predict_iou: predicts the IoU of each box with its object; each from its own box alone, differentiable.
        num_steps: largest number of steps.
        step_size: lambda of the paper.
        early_stop: Omega_1 of the paper.
        degeneration_tolerance: Omega_2 of the paper.
        keep_best: return the place of the largest prediction on each box's way, its start included.

    Returns:
        `RefinementResult` of D rows, in the order of `boxes`.
    """

    def total(boxes):
        predicted = predict_iou(boxes)
        # A prediction depends on its own box alone: the gradient of the sum has each box's own.
        return jnp.sum(predicted), predicted

    def better(best, boxes, predicted):
        rises = predicted > best.predicted_ious
        return RefinementResult(
            boxes=jnp.where(rises[:, None], boxes, best.boxes),
            predicted_ious=jnp.where(rises, predicted, best.predicted_ious),
        )

    def step(_, state):
        boxes, previous, moving, best = state
        gradient, predicted = jax.grad(total, has_aux=True)(boxes)
        gain = predicted - previous
        moving &= (jnp.abs(gain) >= early_stop) & (gain >= degeneration_tolerance)
        sides = jnp.tile(boxes[:, 2:] - boxes[:, :2], 2)
        moves = moving & jnp.all(sides > 0, axis=1)
        refined = jnp.where(moves[:, None], boxes + step_size * gradient * sides, boxes)
        return refined, predicted, moving, better(best, boxes, predicted)

    boxes = boxes.astype(jnp.float32)
    # Before the first step there is no prediction to compare with, and every gain is infinite.
    nowhere = jnp.full(boxes.shape[0], -jnp.inf)
    start = (boxes, nowhere, jnp.ones(boxes.shape[0], bool), RefinementResult(boxes, nowhere))
    boxes, _, _, best = jax.lax.fori_loop(0, num_steps, step, start)
    predicted = predict_iou(boxes)
    if keep_best:
        return better(best, boxes, predicted)
    return RefinementResult(boxes=boxes, predicted_ious=predicted)
