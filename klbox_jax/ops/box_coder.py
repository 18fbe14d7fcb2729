"""Box coders: boxes as offsets from a reference box (an anchor or a proposal), and back.

A coder is a static, hashable value. Arrays may have any leading axes, which broadcast: the deltas of a head
with one box per class, [R, K, 4], are decoded with references of shape [R, 1, 4].

In Detectron, boxes are whole pixels: a box from x1 to x2 has the width x2 - x1 + 1. Add 1 to its x2 and y2, and its
offsets are the same as here.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

# Largest factor by which a decoded side may grow, Detectron's value.
_MAX_RATIO = 1000.0 / 16.0
# Smallest side in pixels that enters a division, so that padded rows stay finite; real boxes are larger.
_MIN_SIZE = 1e-3


@dataclasses.dataclass(frozen=True)
class CornerBoxCoder:
    """Codes the four edges as offsets in widths and heights of the reference, times `weights`.

    The code is linear in the box, so a standard deviation is coded by the same scale as its offset. This is the
    parametrization of KL Loss (He et al. 2019, section 3.1).

    Attributes:
        weights: factors of the offsets of x1, y1, x2, y2.
    """

    weights: tuple[float, float, float, float] = (10.0, 10.0, 10.0, 10.0)

    def encode(
        self, boxes: Float[Array, "*#b 4"], references: Float[Array, "*#b 4"]
    ) -> Float[Array, "*_out 4"]:
        """Returns the deltas of `boxes`, the inverse of `decode`."""
        return (boxes - references) / self._pixels_per_unit(references)

    def decode(
        self, deltas: Float[Array, "*#b 4"], references: Float[Array, "*#b 4"]
    ) -> Float[Array, "*_out 4"]:
        """Returns the boxes of `deltas`, in pixels.

        An edge moves by at most 1000 / 16 sides of the reference. The edges are not put in order: a box
        whose edges cross comes back with x1 > x2.
        """
        weights = jnp.broadcast_to(jnp.asarray(self.weights, deltas.dtype), deltas.shape)
        deltas = jnp.clip(deltas, -_MAX_RATIO * weights, _MAX_RATIO * weights)
        return references + deltas * self._pixels_per_unit(references)

    def encode_stds(
        self, stds: Float[Array, "*#b 4"], references: Float[Array, "*#b 4"]
    ) -> Float[Array, "*_out 4"]:
        """Returns the standard deviations of the deltas from those of the edges in pixels."""
        return stds / self._pixels_per_unit(references)

    def decode_stds(
        self, coded_stds: Float[Array, "*#b 4"], references: Float[Array, "*#b 4"]
    ) -> Float[Array, "*_out 4"]:
        """Returns the standard deviations of the edges in pixels from those of the deltas."""
        return coded_stds * self._pixels_per_unit(references)

    def _pixels_per_unit(self, references: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
        width, height = _sizes(references)
        weight_x1, weight_y1, weight_x2, weight_y2 = self.weights
        return jnp.stack(
            [width / weight_x1, height / weight_y1, width / weight_x2, height / weight_y2], axis=-1
        )


@dataclasses.dataclass(frozen=True)
class CenterBoxCoder:
    """Codes the centre as offsets in sides of the reference and the sides as log ratios, times `weights`.

    The parametrization of R-CNN (Girshick et al. 2014, appendix C), with detectron2's defaults. It is not
    linear in the box, so it cannot code standard deviations.

    Attributes:
        weights: factors of dx, dy, dw, dh.
    """

    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)

    def encode(
        self, boxes: Float[Array, "*#b 4"], references: Float[Array, "*#b 4"]
    ) -> Float[Array, "*_out 4"]:
        """Returns the deltas of `boxes`, the inverse of `decode`."""
        box_width, box_height = _sizes(boxes)
        box_x, box_y = _centers(boxes)
        width, height = _sizes(references)
        x, y = _centers(references)
        weight_x, weight_y, weight_w, weight_h = self.weights
        return jnp.stack(
            [
                weight_x * (box_x - x) / width,
                weight_y * (box_y - y) / height,
                weight_w * jnp.log(box_width / width),
                weight_h * jnp.log(box_height / height),
            ],
            axis=-1,
        )

    def decode(
        self, deltas: Float[Array, "*#b 4"], references: Float[Array, "*#b 4"]
    ) -> Float[Array, "*_out 4"]:
        """Returns the boxes of `deltas`, in pixels; a side grows at most by the factor 1000 / 16."""
        width, height = _sizes(references)
        x, y = _centers(references)
        weight_x, weight_y, weight_w, weight_h = self.weights
        box_x = x + deltas[..., 0] / weight_x * width
        box_y = y + deltas[..., 1] / weight_y * height
        half_width = 0.5 * width * jnp.exp(jnp.minimum(deltas[..., 2] / weight_w, math.log(_MAX_RATIO)))
        half_height = 0.5 * height * jnp.exp(jnp.minimum(deltas[..., 3] / weight_h, math.log(_MAX_RATIO)))
        return jnp.stack(
            [box_x - half_width, box_y - half_height, box_x + half_width, box_y + half_height], axis=-1
        )


def _sizes(boxes: Float[Array, "*b 4"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    width = jnp.maximum(boxes[..., 2] - boxes[..., 0], _MIN_SIZE)
    height = jnp.maximum(boxes[..., 3] - boxes[..., 1], _MIN_SIZE)
    return width, height


def _centers(boxes: Float[Array, "*b 4"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    return 0.5 * (boxes[..., 0] + boxes[..., 2]), 0.5 * (boxes[..., 1] + boxes[..., 3])
