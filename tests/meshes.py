"""Meshes of some of the simulated devices."""

import jax
from jax.sharding import AxisType


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,))
