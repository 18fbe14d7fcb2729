"""Hard non-maximum suppression, exact and with fixed shapes."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class NmsResult:
    """Surviving boxes, best first, then unused slots.

    Attributes:
        indices: row of the input; 0 where `valid` is False.
        valid: False for an unused slot.
    """

    indices: Int[AnyArray, "*b m"]
    valid: Bool[AnyArray, "*b m"]


def hard_nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    valid: Bool[Array, " n"],
    *,
    iou_threshold: float,
    max_outputs: int | None = None,
    classes: Int[Array, " n"] | None = None,
) -> NmsResult:
    """Runs greedy NMS: a box is removed if its IoU with a better surviving box is above the threshold.

    Boxes with equal scores rank by row. An IoU equal to the threshold does not remove: a float32 IoU is compared
    with the threshold in float32. torchvision compares a float32 IoU with a threshold in float64, so at equality
    it does remove for the thresholds 0.1, 0.2, 0.3, 0.4, 0.6 and 0.8, whose float32 values are above the float64
    ones.

    Args:
        boxes: in pixels; n may be 0.
        scores: scores of the boxes, in any order.
        valid: False for rows that neither suppress nor survive; their values are not used.
        iou_threshold: largest IoU that two surviving boxes may have.
        max_outputs: number of slots of the result, filled with the best survivors; n if None.
        classes: if given, only boxes of the same class suppress each other.

    Returns:
        `NmsResult` of `max_outputs` slots.
    """
    order = jnp.argsort(scores, descending=True, stable=True)
    keep = suppress_sorted(
        boxes[order],
        valid[order],
        iou_threshold=iou_threshold,
        classes=None if classes is None else classes[order],
    )
    num_boxes = boxes.shape[0]
    num_slots = num_boxes if max_outputs is None else max_outputs
    # Moves the survivors to the front, in order: on CPU, top_k of a float vector is XLA's fastest way.
    rank = jnp.where(keep, jnp.arange(num_boxes, 0, -1, dtype=jnp.float32), 0.0)
    rank, position = jax.lax.top_k(rank, min(num_slots, num_boxes))
    indices = jnp.where(rank > 0, order[position], 0)
    unused = (0, max(num_slots - num_boxes, 0))
    return NmsResult(indices=jnp.pad(indices, unused), valid=jnp.pad(rank > 0, unused))


def suppress_sorted(
    boxes: Float[Array, "n 4"],
    valid: Bool[Array, " n"],
    *,
    iou_threshold: float,
    classes: Int[Array, " n"] | None = None,
) -> Bool[Array, " n"]:
    """Returns True for each box that survives `hard_nms`; the boxes are sorted, best first.

    A box survives if and only if no better survivor suppresses it. The rule is first applied to "all survive",
    then to its own result until nothing changes. Each round settles at least one more box of the greedy order, so
    the fixed point is the greedy result. Clustered boxes need a few rounds, a chain of n boxes needs n.
    """
    num_boxes = boxes.shape[0]
    num_padding = -num_boxes % 32
    suppressors = jnp.pad(boxes, ((0, num_padding), (0, 0)))
    row, column = jnp.arange(num_boxes + num_padding), jnp.arange(num_boxes)
    suppresses = (pairwise_iou(suppressors, boxes) > iou_threshold) & (row[:, None] < column[None, :])
    if classes is not None:
        suppresses &= jnp.pad(classes, (0, num_padding))[:, None] == classes[None, :]
    # 32 suppressors in a word: a round then reads n * n / 8 bytes and costs little compared with the IoUs.
    suppresses = _pack_rows(suppresses)

    def next_round(keep):
        keep_words = _pack_rows(jnp.pad(keep, (0, num_padding))[:, None])
        return valid & ~jnp.any((suppresses & keep_words) != 0, axis=0)

    _, keep = jax.lax.while_loop(
        lambda rounds: jnp.any(rounds[0] != rounds[1]),
        lambda rounds: (rounds[1], next_round(rounds[1])),
        (valid, next_round(valid)),
    )
    return keep


def _pack_rows(rows: Bool[Array, "n m"]) -> UInt32[Array, "w m"]:
    """Packs groups of 32 rows into one row of 32-bit words; n is a multiple of 32."""
    count, columns = rows.shape
    bit = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    words = jnp.where(rows.reshape(count // 32, 32, columns), bit[None, :, None], jnp.uint32(0))
    return jnp.sum(words, axis=1, dtype=jnp.uint32)
