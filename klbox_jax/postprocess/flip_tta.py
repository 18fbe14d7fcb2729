"""Test-time augmentation by flipping: the mirrored image's predictions, mapped back to the image.

All functions are of one image. The mirror is in the middle of the image's true width, so that the image stays in the
corner of its canvas and the padding stays in its place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.structures import BoxPredictions, Proposals


def mirror_image(image: UInt8[Array, "h w 3"], width: Int[Array, ""]) -> UInt8[Array, "h w 3"]:
    """Returns the image with its first `width` columns in reverse order, and the others as they are."""
    columns = jnp.arange(image.shape[1])
    return image[:, jnp.where(columns < width, width - 1 - columns, columns)]


def mirror_boxes(boxes: Float[Array, "*b 4"], width: Int[Array, ""]) -> Float[Array, "*b 4"]:
    """Maps boxes between the image and its mirror image, in either direction: x becomes width - x."""
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    return jnp.stack([width - x2, y1, width - x1, y2], axis=-1)


def mirror_predictions(
    predictions: BoxPredictions,
    proposals: Proposals,
    width: Int[Array, ""],
    *,
    box_coder: CornerBoxCoder | CenterBoxCoder,
) -> tuple[BoxPredictions, Proposals]:
    """Maps predictions for the mirrored image to predictions for the image.

    Args:
        predictions: of the mirrored image.
        proposals: of the mirrored image.
        width: of the image, in pixels of the canvas.
        box_coder: the coding of the offsets. Corner offsets along x swap places and change sign; their log variances
            only swap places; of centre offsets only dx changes sign.

    Raises:
        ValueError: the weights of x1 and x2 differ, so that an offset and its mirror image are in different units.
    """
    deltas, log_vars = predictions.box_deltas, predictions.box_log_vars
    if isinstance(box_coder, CenterBoxCoder):
        deltas = deltas.at[..., 0].multiply(-1.0)
    else:
        if box_coder.weights[0] != box_coder.weights[2]:
            raise ValueError(
                f"flip=True needs one weight for the offsets of x1 and x2, not {box_coder.weights}: set "
                "config.postprocess.flip to False, or train with equal ones."
            )
        x1, y1, x2, y2 = jnp.moveaxis(deltas, -1, 0)
        deltas = jnp.stack([-x2, y1, -x1, y2], axis=-1)
        if log_vars is not None:
            log_vars = log_vars[..., jnp.array([2, 1, 0, 3])]
    return (
        predictions.replace(box_deltas=deltas, box_log_vars=log_vars),
        proposals.replace(boxes=mirror_boxes(proposals.boxes, width)),
    )


def concat_predictions(
    first: tuple[BoxPredictions, Proposals], second: tuple[BoxPredictions, Proposals]
) -> tuple[BoxPredictions, Proposals]:
    """Concatenates the rows of both, the second after the first."""
    return jax.tree.map(lambda one, other: jnp.concatenate([one, other]), first, second)
