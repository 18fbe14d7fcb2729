"""Hard non-maximum suppression, exact and of fixed shape."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from klbox_jax.ops.boxes import pairwise_iou
from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class NmsResult:
    """The surviving boxes, best first, then unused slots.

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
    """Greedy NMS: a box falls to any better surviving box whose IoU with it is above the threshold.

    Equal scores rank by row. An IoU equal to the threshold does not suppress (as in torchvision).

    Args:
        boxes: in pixels.
        scores: any order; need not be sorted.
        valid: rows that are False neither suppress nor survive; their content is not looked at.
        iou_threshold: largest IoU that two surviving boxes may have.
        max_outputs: how many slots the result has, all n if None; the best survivors fill them.
        classes: where given, boxes of different classes leave each other alone.

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
    # Survivors to the front, in order: top_k of a float vector is XLA's fastest way to do so on CPU.
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
    """Which of the boxes, sorted best first, survive `hard_nms`.

    A box survives exactly if no better survivor suppresses it. Started from "all survive" and applied to its
    own answer, that rule settles one more box of the greedy order at least in every round, so the fixed point
    is the greedy answer; boxes in clusters need a few rounds, a chain of n boxes needs n.
    """
    num_boxes = boxes.shape[0]
    num_padding = -num_boxes % 32
    suppressors = jnp.pad(boxes, ((0, num_padding), (0, 0)))
    row, column = jnp.arange(num_boxes + num_padding), jnp.arange(num_boxes)
    suppresses = (pairwise_iou(suppressors, boxes) > iou_threshold) & (row[:, None] < column[None, :])
    if classes is not None:
        suppresses &= jnp.pad(classes, (0, num_padding))[:, None] == classes[None, :]
    # 32 suppressors a word: a round then reads n * n / 8 bytes and costs little beside the IoUs.
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
    """Packs each 32 rows into one row of 32-bit words; n is a multiple of 32."""
    bit = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    words = jnp.where(rows.reshape(-1, 32, rows.shape[1]), bit[None, :, None], jnp.uint32(0))
    return jnp.sum(words, axis=1, dtype=jnp.uint32)
