"""The boxes of one image that suppression and voting work on."""

import flax.struct
from jaxtyping import Bool, Float, Int

from klbox_jax.structures import AnyArray


@flax.struct.dataclass
class Candidates:
    """Decoded boxes of one image, over all classes.

    Suppression reads the first four fields; voting reads the variances too. Fields that a use does not read may be
    None.

    Attributes:
        boxes: in pixels of the canvas.
        scores: class probability, not negative.
        classes: dense class index.
        valid: False for an unused slot; its other fields may hold anything.
        coded_variances: variance of each edge's coded offset, or None for a head without variances.
        pixel_variances: the same in squared pixels, or None.
        predicted_ious: IoU with the object as predicted by an IoU head, or None.
        proposal_index: the proposal that each candidate was decoded from.
    """

    boxes: Float[AnyArray, "*b N 4"]
    scores: Float[AnyArray, "*b N"] | None
    classes: Int[AnyArray, "*b N"]
    valid: Bool[AnyArray, "*b N"]
    coded_variances: Float[AnyArray, "*b N 4"] | None = None
    pixel_variances: Float[AnyArray, "*b N 4"] | None = None
    predicted_ious: Float[AnyArray, "*b N"] | None = None
    proposal_index: Int[AnyArray, "*b N"] | None = None
