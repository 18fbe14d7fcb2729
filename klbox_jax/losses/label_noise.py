"""Standard deviation of an annotated edge around the true one, for losses whose label is a distribution."""

import jax.numpy as jnp
from jaxtyping import Array, Float

LABEL_NOISE = ("data", "pixels", "size")
# Pixels. A label without any noise has no finite divergence.
_MIN_STD = 1e-3


def label_stds(
    gt_boxes: Float[Array, "*n 4"],
    gt_box_stds: Float[Array, "*n 4"] | None,
    *,
    source: str,
    value: float,
) -> Float[Array, "*n 4"]:
    """Returns the standard deviation of the label noise of each edge, in pixels, at least 1e-3.

    Args:
        gt_boxes: the annotated boxes in pixels of the canvas.
        gt_box_stds: what the data set knows, in pixels of the canvas, or None.
        source: `"data"`: `gt_box_stds`; `"pixels"`: `value` for every edge; `"size"`: `value` times the
            width of the box for x1 and x2, times its height for y1 and y2.
        value: pixels, or a share of the side; not read for `"data"`.

    Raises:
        ValueError: unknown source, or `"data"` where the data set knows no stds.
    """
    if source == "data":
        if gt_box_stds is None:
            raise ValueError(
                "config.model.box_loss_settings.label_noise = 'data' needs annotations with box_stds, which "
                "this data set does not have; set it to 'pixels' or 'size' and give label_noise_value."
            )
        stds = gt_box_stds
    elif source == "pixels":
        stds = jnp.full_like(gt_boxes, value)
    elif source == "size":
        sides = gt_boxes[..., 2:] - gt_boxes[..., :2]
        stds = value * jnp.concatenate([sides, sides], axis=-1)
    else:
        raise ValueError(
            f"config.model.box_loss_settings.label_noise = {source!r} is unknown; "
            f"choose one of {', '.join(LABEL_NOISE)}"
        )
    return jnp.maximum(stds, _MIN_STD)
