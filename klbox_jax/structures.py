"""The padded pytrees that flow through everything.

Shape shorthand, used in the whole package:

    B  images in a batch           G  ground-truth slots of an image
    H, W  canvas height and width  P  proposal slots
    A  anchors                     R  sampled RoIs
    N, M  any number of boxes      K  foreground classes (class K is the background)
    D  detection slots             C  feature channels

Every array may carry leading batch axes (`*b`). Boxes are absolute `x1, y1, x2, y2`, float32, with
continuous edges (pixel `i` covers `[i, i + 1)`), in the canvas of the network. A padded row is marked by
`valid=False`; its other fields hold harmless finite numbers and mean nothing.
"""

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int, UInt8
from numpy import ndarray

# The input pipeline fills these types with NumPy arrays, the compiled steps with JAX arrays, and lowering with
# descriptions of arrays.
AnyArray = Array | ndarray | jax.stages.ArgInfo


@flax.struct.dataclass
class GroundTruth:
    """The annotated objects of an image.

    Attributes:
        boxes: edges in pixels of the canvas.
        classes: dense class index, 0 to K - 1.
        is_crowd: a region of many objects, or an object that VOC calls difficult: ignored in training, handed
            to the evaluator.
        valid: False for a padded slot.
        box_stds: standard deviation of the label noise of each edge, in pixels of the canvas, or None
            where the data set does not know it.
        masks: visible part of each object, cropped to its box and resampled to M x M, or None.
    """

    boxes: Float[AnyArray, "*b G 4"]
    classes: Int[AnyArray, "*b G"]
    is_crowd: Bool[AnyArray, "*b G"]
    valid: Bool[AnyArray, "*b G"]
    box_stds: Float[AnyArray, "*b G 4"] | None = None
    masks: UInt8[AnyArray, "*b G M M"] | None = None


@flax.struct.dataclass
class Batch:
    """What one step of the network reads.

    Attributes:
        images: RGB, 0 to 255, zero outside `image_size`.
        image_size: true height and width inside the canvas, in pixels.
        scale: canvas pixels per file pixel, for x and for y.
        image_id: the id of the image in its data set.
        valid: False for an image that only fills the batch.
        gt: the annotated objects.
    """

    images: UInt8[AnyArray, "*b H W 3"]
    image_size: Int[AnyArray, "*b 2"]
    scale: Float[AnyArray, "*b 2"]
    image_id: Int[AnyArray, "*b"]
    valid: Bool[AnyArray, "*b"]
    gt: GroundTruth


@flax.struct.dataclass
class Proposals:
    """What the RPN hands to the box head, best first."""

    boxes: Float[AnyArray, "*b P 4"]
    objectness_logits: Float[AnyArray, "*b P"]
    valid: Bool[AnyArray, "*b P"]


@flax.struct.dataclass
class RoISamples:
    """The RoIs that the box head is trained on, each with what it was matched to.

    Attributes:
        boxes: the RoIs.
        gt_index: slot of the matched object in `GroundTruth`.
        gt_boxes: box of the matched object; meaningless where `is_foreground` is False.
        gt_classes: class of the matched object, K for the background.
        is_foreground: the RoI stands for an object.
        valid: False for a padded row.
        gt_box_stds: label noise of the matched object in pixels, or None.
    """

    boxes: Float[AnyArray, "*b R 4"]
    gt_index: Int[AnyArray, "*b R"]
    gt_boxes: Float[AnyArray, "*b R 4"]
    gt_classes: Int[AnyArray, "*b R"]
    is_foreground: Bool[AnyArray, "*b R"]
    valid: Bool[AnyArray, "*b R"]
    gt_box_stds: Float[AnyArray, "*b R 4"] | None = None


@flax.struct.dataclass
class BoxPredictions:
    """Raw outputs of the box head for each RoI.

    Attributes:
        class_logits: the last column is the background.
        box_deltas: coded offsets, one row for each class, or a single row where the head is
            class-agnostic (`Kb` is K or 1).
        box_log_vars: alpha = log sigma^2 of each coded offset, or None for a head without variances.
    """

    class_logits: Float[AnyArray, "*b R K1"]
    box_deltas: Float[AnyArray, "*b R Kb 4"]
    box_log_vars: Float[AnyArray, "*b R Kb 4"] | None = None


@flax.struct.dataclass
class Detections:
    """The detector's answer for an image, best first.

    Attributes:
        boxes: edges in pixels of the canvas (of the file after `unscale`).
        scores: class probability after suppression; times what `score_by_iou` or `score_by_std` of the post-processing
            say, and with weighted boxes fusion the mean of a cluster.
        classes: dense class index.
        candidate_index: row of `BoxPredictions` that each detection was made from; with `flip` of the post-processing,
            those of the mirrored image follow those of the image.
        valid: False for an unused slot.
        box_stds: standard deviation of each edge, same space as `boxes`, or None.
        masks: mask probabilities cropped to the box, or None.
        predicted_ious: what an IoU head takes the IoU with the object for, 0 to 1, or None.
    """

    boxes: Float[AnyArray, "*b D 4"]
    scores: Float[AnyArray, "*b D"]
    classes: Int[AnyArray, "*b D"]
    candidate_index: Int[AnyArray, "*b D"]
    valid: Bool[AnyArray, "*b D"]
    box_stds: Float[AnyArray, "*b D 4"] | None = None
    masks: Float[AnyArray, "*b D m m"] | None = None
    predicted_ious: Float[AnyArray, "*b D"] | None = None
