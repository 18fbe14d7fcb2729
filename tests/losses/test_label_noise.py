import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.losses.label_noise import LABEL_NOISE, label_stds

# 20 wide and 50 high; a padded row; a row whose corners are crossed.
BOXES = jnp.array([[10.0, 10, 30, 60], [0, 0, 0, 0], [5, 5, 2, 1]])
STDS = jnp.array([[1.0, 2, 3, 4], [0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data", [[1, 2, 3, 4], [1e-3] * 4, [0.5] * 4]),
        ("pixels", [[0.1] * 4] * 3),
        ("size", [[2, 5, 2, 5], [1e-3] * 4, [1e-3] * 4]),
    ],
)
def test_sources(source, expected):
    stds = label_stds(BOXES, STDS, source=source, value=0.1)
    np.testing.assert_allclose(stds, expected, rtol=1e-6)
    assert stds.dtype == jnp.float32
    # Any leading axes; the stds of the data set are read by one source alone.
    batched = label_stds(BOXES[None], STDS[None] if source == "data" else None, source=source, value=0.1)
    np.testing.assert_array_equal(batched[0], stds)


def test_stds_the_data_set_does_not_have():
    with pytest.raises(ValueError, match=r"config\.model\.box_loss_settings\.label_noise = 'data' needs"):
        label_stds(BOXES, None, source="data", value=1.0)


def test_unknown_source():
    with pytest.raises(ValueError, match=", ".join(LABEL_NOISE)):
        label_stds(BOXES, STDS, source="none", value=1.0)
