"""Habits of the KL-Loss release that differ from the paper, in one place.

The release is yihui-he/KL-Loss (`soft` in detectron/utils/py_cpu_nms.py, and detectron/core/test.py). A config's
`legacy=detectron` sets the four fields of `PostprocessSettings` that these functions serve; docs/legacy.md compares.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from klbox_jax.postprocess.greedy_suppression import SuppressionResult

VOTERS = ("all", "remaining")
VARIANCE_ORDERS = ("corners", "detectron")


def end_at_last_pixel(
    references: Float[Array, "N 4"], scale: Float[Array, "2"] | None
) -> tuple[Float[Array, "N 4"], Float[Array, "2"]]:
    """Moves the right and bottom edges of references from the end of the canvas' last pixel to that of the file's.

    Detectron scales a box's first and last pixel to the file and decodes there, so that the last pixel is one of the
    file (`plus_one_widths`).

    Args:
        references: boxes that offsets are relative to, in pixels of the canvas.
        scale: canvas pixels per file pixel, x and y; 1 if None.

    Returns:
        The references, and the size of a file's pixel in the canvas, which a clipped box keeps at least.
    """
    pixel = jnp.ones(2) if scale is None else scale
    return references + jnp.concatenate([jnp.zeros(2), pixel - 1.0])[None, :], pixel


def remaining_voters(kept: SuppressionResult) -> Bool[Array, "D N"]:
    """Returns True where a candidate was still in the queue when a kept box was picked (`voters="remaining"`)."""
    return jnp.arange(len(kept.indices))[:, None] < kept.num_picks_alive[None, :]


def in_detectron_order(variances: Float[Array, "N 4"]) -> Float[Array, "N 4"]:
    """Returns variances in the order x1, x2, y1, y2, in which the release divides x1, y1, x2, y2 by them."""
    x1, y1, x2, y2 = variances.T
    return jnp.stack([x1, x2, y1, y2], axis=-1)
