"""Padded pytrees that all parts of the package exchange.

Shape shorthand, used in the whole package:

    B  images in a batch           G  ground-truth slots of an image
    H, W  canvas height and width  P  proposal slots
    A  anchors                     R  sampled RoIs
    N, M  any number of boxes      K  foreground classes (class K is the background)
    D  detection slots             C  feature channels

Every array may carry leading batch axes (`*b`). Boxes are absolute `x1, y1, x2, y2`, float32, with
continuous edges (pixel `i` covers `[i, i + 1)`), in the canvas of the network. `valid=False` marks a padded row;
its other fields hold finite numbers without meaning.
"""

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int, UInt8
from numpy import ndarray

# The input pipeline fills these types with NumPy arrays, the compiled steps with JAX arrays, and lowering with
# shapes and dtypes of arrays.
AnyArray = Array | ndarray | jax.stages.ArgInfo


@flax.struct.dataclass
class GroundTruth:
    """Annotated objects of an image.

    Attributes:
        boxes: edges in pixels of the canvas.
        classes: dense class index, 0 to K - 1.
        is_crowd: True for a region of many objects (COCO's crowd) and for an object that VOC calls difficult.
            Training ignores it; the evaluator receives it.
        valid: False for a padded slot.
        box_stds: standard deviation of the label noise of each edge, in pixels of the canvas; None if the data
            set has no such numbers.
        masks: visible part of each object, cropped to its box and resampled to M x M; None without masks.
    """

    boxes: Float[AnyArray, "*b G 4"]
    classes: Int[AnyArray, "*b G"]
    is_crowd: Bool[AnyArray, "*b G"]
    valid: Bool[AnyArray, "*b G"]
    box_stds: Float[AnyArray, "*b G 4"] | None = None
    masks: UInt8[AnyArray, "*b G M M"] | None = None


@flax.struct.dataclass
class Batch:
    """Input of one training or evaluation step.

    Attributes:
        images: RGB, 0 to 255, zero outside `image_size`.
        image_size: true height and width inside the canvas, in pixels.
        scale: canvas pixels per file pixel, for x and for y.
        image_id: the id of the image in its data set.
        valid: False for a padding image, added to complete the batch.
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
    """Boxes that the RPN proposes to the second stage, best first.

    Attributes:
        boxes: edges in pixels of the canvas, inside the image.
        objectness_logits: one score for each box.
        valid: False for an unused slot.
    """

    boxes: Float[AnyArray, "*b P 4"]
    objectness_logits: Float[AnyArray, "*b P"]
    valid: Bool[AnyArray, "*b P"]


@flax.struct.dataclass
class RoISamples:
    """RoIs that train the heads, each with the object it was matched to.

    Attributes:
        boxes: edges of the RoIs in pixels of the canvas.
        gt_index: slot of the matched object in `GroundTruth`.
        gt_boxes: box of the matched object; without meaning where `is_foreground` is False.
        gt_classes: class of the matched object, K for the background.
        is_foreground: True for a RoI that is matched to an object.
        valid: False for a padded row.
        gt_box_stds: standard deviation of the label noise of the matched object in pixels, or None.
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
    """Raw outputs of the box predictor for each RoI.

    Attributes:
        class_logits: one column for each class; the last column is the background.
        box_deltas: coded offsets, one row for each class, or a single row for a class-agnostic head (`Kb` is K
            or 1).
        box_log_vars: alpha = log sigma^2 of each coded offset, or None for a head without variances.
    """

    class_logits: Float[AnyArray, "*b R K1"]
    box_deltas: Float[AnyArray, "*b R Kb 4"]
    box_log_vars: Float[AnyArray, "*b R Kb 4"] | None = None


@flax.struct.dataclass
class Detections:
    """Detections of an image, best first.

    Attributes:
        boxes: edges in pixels of the canvas (of the file after `unscale`).
        scores: class probability after suppression. The post-processing multiplies it by the factors of `score_by_iou`
            and `score_by_std` if these are set; weighted boxes fusion takes the mean of a cluster.
        classes: dense class index, 0 to K - 1.
        candidate_index: row of `BoxPredictions` from which each detection was made. With `flip` of the
            post-processing, the rows of the mirrored image follow the rows of the image.
        valid: False for an unused slot.
        box_stds: standard deviation of each edge, same space as `boxes`, or None.
        masks: mask probabilities cropped to the box, or None.
        predicted_ious: IoU with the object as predicted by the IoU head, 0 to 1; None without such a head.
    """

    boxes: Float[AnyArray, "*b D 4"]
    scores: Float[AnyArray, "*b D"]
    classes: Int[AnyArray, "*b D"]
    candidate_index: Int[AnyArray, "*b D"]
    valid: Bool[AnyArray, "*b D"]
    box_stds: Float[AnyArray, "*b D 4"] | None = None
    masks: Float[AnyArray, "*b D m m"] | None = None
    predicted_ious: Float[AnyArray, "*b D"] | None = None


@flax.struct.dataclass
class TrainOutputs:
    """Losses of one head or of the whole detector, and numbers to watch.

    Attributes:
        losses: scalars by name; training minimizes their sum. `loss_rpn_cls`, `loss_rpn_loc`, `loss_cls`,
            `loss_box_reg`, with a mask head `loss_mask`, with an IoU head `loss_iou`.
        metrics: scalars by name, without a gradient.
    """

    losses: dict[str, Float[AnyArray, ""]]
    metrics: dict[str, Float[AnyArray, ""]]
