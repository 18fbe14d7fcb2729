"""Bit-exact comparison of pytrees."""

import jax
import numpy as np


def assert_same_bits(left, right):
    """The same structure, and the same dtype, shape and bytes of each leaf."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(
        map(np.asarray, jax.tree.leaves(left)), map(np.asarray, jax.tree.leaves(right)), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
