"""Jitters ground-truth boxes to a chosen IoU: the training boxes of IoU-Net's IoU head."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from klbox_jax.ops.boxes import clip_to_image, is_nonempty, paired_iou
from klbox_jax.structures import AnyArray, GroundTruth

# Factor on the largest distance that an unclipped box can need: when the image border stops the fastest edges, the
# slower ones have to move farther to reach the target IoU.
_REACH = 8.0
# Bisection steps; the last one moves an edge by a millionth of the box's side.
_NUM_BISECTIONS = 23


@flax.struct.dataclass
class JitteredBoxes:
    """Boxes near objects, with their IoUs.

    Attributes:
        boxes: in pixels of the canvas, inside the image; zeros where not valid.
        gt_index: slot of the object in `GroundTruth`; 0 where not valid.
        iou: IoU of each box with its object; 0 where not valid.
        valid: False for an unused slot: no object, or its part inside the image is too small.
    """

    boxes: Float[AnyArray, "*b S 4"]
    gt_index: Int[AnyArray, "*b S"]
    iou: Float[AnyArray, "*b S"]
    valid: Bool[AnyArray, "*b S"]


def jitter_boxes(
    key: PRNGKeyArray,
    gt: GroundTruth,
    image_size: Int[Array, "2"],
    *,
    num_samples: int,
    min_iou: float = 0.5,
) -> JitteredBoxes:
    """Draws boxes whose IoU with an object is uniform between `min_iou` and 1.

    IoU-Net (Jiang et al., ECCV 2018, section 3.1) trains its IoU head on jittered ground-truth boxes with IoUs
    of at least 0.5, balanced over the IoU, and not on proposals; the paper does not define the jitter. Here a
    target IoU is drawn first, then a direction of the four edges (in units of the box's sides, uniform on the
    surface of a cube). The box moves along it until its IoU is the target. The IoU never rises on the way, so
    bisection finds the distance: the balance is exact, and no draw is rejected.

    Boxes are clipped to the image as they move, like detections. In some directions an object at the border
    cannot grow enough; its box then has the smallest possible IoU, which is above the target. An object that
    is partly outside the image cannot be covered; its IoU is at most the share of its area inside. `iou` is
    always the IoU of the returned box.

    Args:
        key: random key; the same key and objects give the same boxes.
        gt: ground truth of one image. Padded slots, crowd regions and boxes without area are not used.
        image_size: height and width in pixels.
        num_samples: number of boxes, divided evenly among the objects; a random choice of them gets the remainder.
        min_iou: smallest IoU, positive.

    Returns:
        `JitteredBoxes` of `num_samples` rows. A row is not valid if there is no object, or if the share of its
        object inside the image is below `min_iou`.
    """
    if gt.boxes.shape[0] == 0:
        zeros = jnp.zeros(num_samples)
        return JitteredBoxes(
            boxes=jnp.zeros((num_samples, 4)),
            gt_index=jnp.zeros(num_samples, jnp.int32),
            iou=zeros,
            valid=zeros > 0,
        )
    order_key, target_key, direction_key = jax.random.split(key, 3)
    may_use = gt.valid & ~gt.is_crowd & is_nonempty(gt.boxes)
    order = jnp.argsort(jnp.where(may_use, jax.random.uniform(order_key, may_use.shape), 2.0))
    num_objects = jnp.sum(may_use)
    gt_index = order[jnp.arange(num_samples) % jnp.maximum(num_objects, 1)]
    objects = jnp.where(num_objects > 0, gt.boxes[gt_index].astype(jnp.float32), 0.0)

    target = jax.random.uniform(target_key, (num_samples,), minval=min_iou, maxval=1.0)
    direction = jax.random.uniform(direction_key, (num_samples, 4), minval=-1.0, maxval=1.0)
    direction /= jnp.maximum(jnp.max(jnp.abs(direction), axis=1, keepdims=True), 1e-6)
    step = direction * jnp.tile(objects[:, 2:] - objects[:, :2], 2)

    def moved(distance):
        boxes = clip_to_image(objects + distance[:, None] * step, image_size)
        return boxes, paired_iou(tuple(boxes.T), tuple(objects.T))

    def bisect(_, interval):
        near, far = interval
        middle = 0.5 * (near + far)
        is_near = moved(middle)[1] >= target
        return jnp.where(is_near, middle, near), jnp.where(is_near, far, middle)

    # Without clipping, one edge moves by `distance` sides, and the IoU is at most 1 / (1 + distance).
    near = jnp.zeros(num_samples)
    far = jnp.full(num_samples, _REACH * (1.0 / min_iou - 1.0))
    near, _ = jax.lax.fori_loop(0, _NUM_BISECTIONS, bisect, (near, far))
    boxes, iou = moved(near)
    valid = (num_objects > 0) & (iou >= min_iou)
    return JitteredBoxes(
        boxes=jnp.where(valid[:, None], boxes, 0.0),
        gt_index=jnp.where(valid, gt_index, 0),
        iou=jnp.where(valid, iou, 0.0),
        valid=valid,
    )
