import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.roi_pooler import RoIPooler


def pyramid(levels):
    """Each map holds the column of its cell, in cells, plus 1000 times its level."""
    return {
        f"p{level}": jnp.broadcast_to(
            jnp.arange(256 // 2**level, dtype=jnp.float32)[None, :, None] + 1000 * level,
            (256 // 2**level, 256 // 2**level, 1),
        )
        for level in levels
    }


@pytest.mark.parametrize("method", ["align", "precise"])
def test_the_last_pixel_is_left_out_and_still_chooses_the_level(method):
    fields = {"method": method, "levels": (3, 4), "resolution": 1, "aligned": False}
    # 112 is the least side that is pooled from level 3 and 224 from level 4, the pixels of a box counted whole.
    boxes = jnp.array([[16.0, 16, 48, 48], [8, 8, 232, 232], [8, 8, 231.5, 231.5]])
    whole = jax.jit(RoIPooler(**fields))(pyramid((3, 4)), boxes).ravel()
    trimmed = jax.jit(RoIPooler(**fields, plus_one_widths=True))(pyramid((3, 4)), boxes).ravel()
    # The mean of a ramp is its middle: (16 + 48) / 2 pixels in cells of 8, half a pixel less without the last one.
    np.testing.assert_allclose(whole, [3000 + 4, 4000 + 120 / 16, 3000 + 119.75 / 8], rtol=1e-6)
    np.testing.assert_allclose(trimmed, [3000 + 31.5 / 8, 4000 + 119.5 / 16, 3000 + 119.25 / 8], rtol=1e-6)


def test_max_pooling_leaves_the_last_pixel_out():
    fields = {"method": "max", "levels": (4,), "resolution": 1}
    # 40 / 16 rounds to cell 3, 39 / 16 to cell 2.
    boxes = jnp.array([[0.0, 0, 40, 40]])
    for plus_one_widths, expected in ((False, 4003), (True, 4002)):
        pooler = RoIPooler(**fields, plus_one_widths=plus_one_widths)
        assert float(jax.jit(pooler)(pyramid((4,)), boxes).ravel()[0]) == expected
